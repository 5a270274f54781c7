{{/* Does the context fit? The arithmetic of ic_model.sizing_serving on the shapes in files/sizing.json; tests hold the two equal. */}}

{{- define "ic.table" -}}
{{- .Files.Get "files/sizing.json" -}}
{{- end -}}

{{- define "ic.isFloat32" -}}
{{- if has .Values.engine.dtype (list "float" "float32") -}}yes{{- end -}}
{{- end -}}

{{/* The model as JSON: bytes of all weights, KV numbers per token and layer, layers, longest context; a preset's shape. */}}
{{- define "ic.shape" -}}
{{- $table := include "ic.table" . | fromJson -}}
{{- $preset := .Values.model.preset -}}
{{- if eq $preset "custom" -}}
{{- $size := .Values.model.size -}}
{{- range $key := list "weightBytes" "kvBytesPerToken" "maxContextTokens" "workspaceBytes" -}}
{{- if not (get $size $key) -}}
{{- fail (printf "\n\nmodel.size.%s is 0, and model.preset is custom; accepted: a number from `python -m ic_model.sizing FOLDER --json`.\n" $key) -}}
{{- end -}}
{{- end -}}
{{- dict "weightBytes" $size.weightBytes "kvNumbers" (div $size.kvBytesPerToken 2) "layers" 1 "maxContextTokens" $size.maxContextTokens "workspaceBytes" $size.workspaceBytes | toJson -}}
{{- else if hasKey $table.presets $preset -}}
{{- $shape := get $table.presets $preset -}}
{{- $weights := mul $shape.parameters (ternary 4 2 (eq (include "ic.isFloat32" .) "yes")) -}}
{{- if .Values.engine.quantization -}}
{{- /* quantised layers at most one byte per weight; embeddings stay as they are */ -}}
{{- $weights = add (sub $shape.parameters $shape.embeddingParameters) (mul $shape.embeddingParameters 2) -}}
{{- end -}}
{{- merge (dict "weightBytes" $weights "kvNumbers" (add $shape.kvLoraRank $shape.qkRopeHeadDim)) $shape | toJson -}}
{{- else -}}
{{- fail (printf "\n\nmodel.preset is %q; accepted: %s, or custom with model.size.\n" $preset (keys $table.presets | sortAlpha | join ", ")) -}}
{{- end -}}
{{- end -}}

{{- define "ic.maxModelLen" -}}
{{- $shape := include "ic.shape" . | fromJson -}}
{{- .Values.engine.maxModelLen | default $shape.maxContextTokens | int64 -}}
{{- end -}}

{{/* Bytes of the KV cache per token on the device that has the most layers. */}}
{{- define "ic.kvBytesPerToken" -}}
{{- $shape := include "ic.shape" . | fromJson -}}
{{- $bytes := ternary 4 2 (eq (include "ic.isFloat32" .) "yes") -}}
{{- if ne .Values.engine.kvCacheDtype "auto" -}}{{- $bytes = 1 -}}{{- end -}}
{{- $stages := int64 .Values.engine.pipelineParallelSize -}}
{{- if eq .Values.model.preset "custom" -}}
{{- div (add (mul $shape.kvNumbers $bytes) (sub $stages 1)) $stages -}}
{{- else -}}
{{- mul $shape.kvNumbers $bytes (div (add $shape.layers (sub $stages 1)) $stages) -}}
{{- end -}}
{{- end -}}

{{- define "ic.gib" -}}
{{- printf "%.2f" (divf . 1073741824.0) -}}
{{- end -}}

{{- define "ic.checkMemory" -}}
{{- $shape := include "ic.shape" . | fromJson -}}
{{- $tokens := include "ic.maxModelLen" . | int64 -}}
{{- $longest := int64 $shape.maxContextTokens -}}
{{- if gt $tokens $longest -}}
{{- fail (printf "\n\nengine.maxModelLen is %d; accepted: up to %d, the longest context of %s, or 0 for that.\n" $tokens $longest .Values.model.preset) -}}
{{- end -}}
{{- if .Values.gpu.enabled -}}
{{- include "ic.checkGpuMemory" . -}}
{{- else -}}
{{- include "ic.checkCpuMemory" . -}}
{{- end -}}
{{- end -}}

{{/* Bytes that vLLM may use of one GPU. */}}
{{- define "ic.usableBytes" -}}
{{- mulf .Values.gpu.memoryGib .Values.engine.gpuMemoryUtilization 1073741824.0 | floor | int64 -}}
{{- end -}}

{{/* Flags of a step as JSON, {tokens, sequences}: the values, or what vLLM takes for a card of this memory. */}}
{{- define "ic.step" -}}
{{- $defaults := dict -}}
{{- range (include "ic.table" . | fromJson).vllmDefaults -}}
{{- if ge (float64 $.Values.gpu.memoryGib) (float64 .fromGib) -}}{{- $defaults = . -}}{{- end -}}
{{- end -}}
{{- $tokens := int64 (.Values.engine.maxNumBatchedTokens | default $defaults.tokens) -}}
{{- $sequences := int64 (.Values.engine.maxNumSeqs | default (min (int64 $defaults.sequences) $tokens)) -}}
{{- dict "tokens" $tokens "sequences" $sequences | toJson -}}
{{- end -}}

{{/* Bytes on one GPU beside weights and cache; `ServerMemory` of ic_model.sizing_serving, less these two. */}}
{{- define "ic.workspaceBytes" -}}
{{- $shape := include "ic.shape" . | fromJson -}}
{{- if eq .Values.model.preset "custom" -}}
{{- int64 $shape.workspaceBytes -}}
{{- else -}}
{{- $t := include "ic.table" . | fromJson -}}
{{- $step := include "ic.step" . | fromJson -}}
{{- $gpus := int64 .Values.engine.tensorParallelSize -}}
{{- $element := ternary 4 2 (eq (include "ic.isFloat32" .) "yes") -}}
{{- $heads := div $shape.heads $gpus -}}
{{- $c := int64 $shape.kvLoraRank -}}{{- $r := int64 $shape.qkRopeHeadDim -}}
{{- $p := int64 $shape.qkNopeHeadDim -}}{{- $v := int64 $shape.vHeadDim -}}
{{- $absorbed := mul $element $shape.layers $heads $c (add $p $v) -}}
{{- /* prefill_workspace_tokens: the power of two that fits the budget */ -}}
{{- $expanded := mul $heads (add (mul 2 $p) $v $r) -}}
{{- $perRow := add (mul (add $c $r) (add $element 4)) (mul $expanded $element) 8 -}}
{{- $budget := min (max (div (include "ic.usableBytes" . | int64) $t.prefill.share) $t.prefill.minBytes) $t.prefill.maxBytes -}}
{{- $rows := int64 $t.prefill.minTokens -}}
{{- range until 32 -}}
{{- if le (mul 2 $rows $perRow) $budget -}}{{- $rows = mul 2 $rows -}}{{- end -}}
{{- end -}}
{{- /* prefill_peak_bytes: new tokens, or one pass of context */ -}}
{{- $output := mul $step.tokens $heads $v -}}
{{- $lse := mul 4 $step.tokens $heads -}}
{{- $new := add (mul $step.tokens $expanded $element) (mul 2 $output $element) $lse -}}
{{- $context := add (mul $rows $perRow) (mul $output (add 4 (mul 2 $element))) (mul 6 $lse) -}}
{{- $query := add (mul 2 $heads (add $p $r)) (mul $heads $v) $shape.qLoraRank -}}
{{- $widest := max (add (div (mul 2 $shape.intermediateSize) $gpus) (div $shape.intermediateSize $gpus)) $query -}}
{{- $activations := mul $element $step.tokens (add (mul 3 $shape.hiddenSize) $widest) -}}
{{- $logits := mul 8 $step.sequences $shape.vocabSize -}}
{{- add $absorbed (max $new $context) $activations $logits (mul $t.graphBytesPerLayer $shape.layers) $t.runtimeBytes -}}
{{- end -}}
{{- end -}}

{{- define "ic.checkGpuMemory" -}}
{{- $shape := include "ic.shape" . | fromJson -}}
{{- $engine := .Values.engine -}}
{{- with $shape.heads -}}
{{- if mod . $engine.tensorParallelSize -}}
{{- fail (printf "\n\nengine.tensorParallelSize is %v; accepted: what divides the %v attention heads of %s.\n" $engine.tensorParallelSize . $.Values.model.preset) -}}
{{- end -}}
{{- if gt (int64 $engine.pipelineParallelSize) (int64 $shape.layers) -}}
{{- fail (printf "\n\nengine.pipelineParallelSize is %v; accepted: up to the %v layers of %s.\n" $engine.pipelineParallelSize $shape.layers $.Values.model.preset) -}}
{{- end -}}
{{- end -}}
{{- $tokens := include "ic.maxModelLen" . | int64 -}}
{{- $gpus := include "ic.gpusPerPod" . | int64 -}}
{{- $weights := div (add (int64 $shape.weightBytes) (sub $gpus 1)) $gpus -}}
{{- $workspace := include "ic.workspaceBytes" . | int64 -}}
{{- $usable := include "ic.usableBytes" . | int64 -}}
{{- /* whole pages, and the one that vLLM keeps */ -}}
{{- $page := int64 (include "ic.table" . | fromJson).pageTokens -}}
{{- $pageBytes := mul $page (include "ic.kvBytesPerToken" . | int64) -}}
{{- $cache := mul $pageBytes (add (div (add $tokens (sub $page 1)) $page) 1) -}}
{{- $need := add $weights $cache $workspace -}}
{{- if gt $need $usable -}}
{{- $fits := max 0 (mul $page (sub (div (sub $usable (add $weights $workspace)) $pageBytes) 1)) -}}
{{- $asked := ternary (printf "%d" $tokens) (printf "0, the model's own %d tokens," $tokens) (gt (int64 $engine.maxModelLen) 0) -}}
{{- $remedy := printf "set engine.maxModelLen to at most %d" (int64 $fits) -}}
{{- if lt $fits $page -}}{{- $remedy = "no context fits: use a larger GPU, a higher engine.tensorParallelSize, quantised weights, or a lower engine.maxNumBatchedTokens" -}}{{- end -}}
{{- if eq $engine.kvCacheDtype "auto" -}}{{- $remedy = printf "%s; engine.kvCacheDtype fp8 halves the KV cache" $remedy -}}{{- end -}}
{{- fail (printf "\n\nengine.maxModelLen is %s and needs %s GiB on each GPU (weights %s, KV cache %s, workspace %s), but gpu.memoryGib %v x engine.gpuMemoryUtilization %v gives %s GiB.\nRemedy: %s.\n" $asked (include "ic.gib" $need) (include "ic.gib" $weights) (include "ic.gib" $cache) (include "ic.gib" $workspace) .Values.gpu.memoryGib $engine.gpuMemoryUtilization (include "ic.gib" $usable) $remedy) -}}
{{- end -}}
{{- end -}}

{{/* The plugin's own arithmetic (ic_vllm_plugin.cpu_defaults): whole pages, and one that is vLLM's. */}}
{{- define "ic.checkCpuMemory" -}}
{{- $shape := include "ic.shape" . | fromJson -}}
{{- $cpu := (include "ic.table" . | fromJson).cpu -}}
{{- $tokens := include "ic.maxModelLen" . | int64 -}}
{{- $kv := include "ic.kvBytesPerToken" . | int64 -}}
{{- $page := int64 $cpu.pageTokens -}}
{{- $cache := mul .Values.cpu.kvCacheGib 1073741824 -}}
{{- $need := mul $kv $page (add (div (add $tokens (sub $page 1)) $page) 1) -}}
{{- if gt $need $cache -}}
{{- $fits := mul $page (sub (div $cache (mul $kv $page)) 1) -}}
{{- fail (printf "\n\nengine.maxModelLen is %d tokens and needs a KV cache of %s GiB, but cpu.kvCacheGib is %v.\nRemedy: set engine.maxModelLen to at most %d, or cpu.kvCacheGib to at least %d.\n" $tokens (include "ic.gib" $need) .Values.cpu.kvCacheGib $fits (div (add $need 1073741823) 1073741824)) -}}
{{- end -}}
{{- $floor := add $cache (mul (int64 $cpu.weightCopies) (int64 $shape.weightBytes)) (int64 $cpu.processesBytes) -}}
{{- $limits := dict -}}
{{- if .Values.serving.enabled -}}{{- $_ := set $limits "serving" .Values.serving.resources -}}{{- end -}}
{{- if .Values.batch.enabled -}}{{- $_ := set $limits "batch" .Values.batch.resources -}}{{- end -}}
{{- range $part, $resources := $limits -}}
{{- with ($resources.limits).memory -}}
{{- if lt (include "ic.bytes" . | int64) $floor -}}
{{- fail (printf "\n\n%s.resources.limits.memory is %v, but weights, KV cache (cpu.kvCacheGib %v) and vLLM's processes take %s GiB.\nRemedy: set it to at least %dMi.\n" $part . $.Values.cpu.kvCacheGib (include "ic.gib" $floor) (div (add $floor 1048575) 1048576)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Bytes of a Kubernetes quantity, for the units that memory is written in. */}}
{{- define "ic.bytes" -}}
{{- $text := toString . -}}
{{- $units := dict "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 "k" 1000 "M" 1000000 "G" 1000000000 "T" 1000000000000 "" 1 -}}
{{- $number := regexFind "^[0-9]+(\\.[0-9]+)?" $text -}}
{{- $unit := trimPrefix $number $text -}}
{{- if not (hasKey $units $unit) -}}
{{- fail (printf "\n\nmemory is %q; accepted: a number with Ki, Mi, Gi, Ti, k, M, G, T or no unit.\n" $text) -}}
{{- end -}}
{{- mulf (float64 $number) (get $units $unit) | floor | int64 -}}
{{- end -}}
