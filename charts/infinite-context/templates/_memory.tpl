{{/* Does the context fit? The numbers are those of ic_model.sizing, through files/sizing.json. */}}

{{/* Shape of the model as JSON: parameters in bytes, KV numbers per token, longest context, workspace. */}}
{{- define "ic.shape" -}}
{{- $table := .Files.Get "files/sizing.json" | fromJson -}}
{{- $preset := .Values.model.preset -}}
{{- if eq $preset "custom" -}}
{{- $size := .Values.model.size -}}
{{- range $key := list "weightBytes" "kvBytesPerToken" "maxContextTokens" "workspaceBytes" -}}
{{- if not (get $size $key) -}}
{{- fail (printf "\n\nmodel.size.%s is 0, and model.preset is custom; accepted: a number from `python -m ic_model.sizing FOLDER --json`.\n" $key) -}}
{{- end -}}
{{- end -}}
{{- dict "weightBytes" $size.weightBytes "kvNumbers" (div $size.kvBytesPerToken 2) "maxContextTokens" $size.maxContextTokens "workspaceFixedBytes" $size.workspaceBytes "workspaceRowBytes" 0 | toJson -}}
{{- else if hasKey $table.presets $preset -}}
{{- $shape := get $table.presets $preset -}}
{{- $large := has .Values.engine.dtype (list "float" "float32") -}}
{{- $weights := mul $shape.parameters (ternary 4 2 $large) -}}
{{- if .Values.engine.quantization -}}
{{- /* quantised layers at most one byte per weight; embeddings stay as they are */ -}}
{{- $weights = add (sub $shape.parameters $shape.embeddingParameters) (mul $shape.embeddingParameters 2) -}}
{{- end -}}
{{- dict "weightBytes" $weights "kvNumbers" $shape.kvNumbersPerToken "maxContextTokens" $shape.maxContextTokens "workspaceFixedBytes" $shape.workspaceFixedBytes "workspaceRowBytes" $shape.workspaceRowBytes | toJson -}}
{{- else -}}
{{- fail (printf "\n\nmodel.preset is %q; accepted: %s, or custom with model.size.\n" $preset (keys $table.presets | sortAlpha | join ", ")) -}}
{{- end -}}
{{- end -}}

{{- define "ic.maxModelLen" -}}
{{- $shape := include "ic.shape" . | fromJson -}}
{{- .Values.engine.maxModelLen | default $shape.maxContextTokens | int64 -}}
{{- end -}}

{{/* Bytes of the KV cache per token on one device. */}}
{{- define "ic.kvBytesPerToken" -}}
{{- $shape := include "ic.shape" . | fromJson -}}
{{- $bytes := ternary 4 2 (has .Values.engine.dtype (list "float" "float32")) -}}
{{- if ne .Values.engine.kvCacheDtype "auto" -}}{{- $bytes = 1 -}}{{- end -}}
{{- $stages := int64 .Values.engine.pipelineParallelSize -}}
{{- div (add (mul $shape.kvNumbers $bytes) (sub $stages 1)) $stages -}}
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

{{- define "ic.checkGpuMemory" -}}
{{- $shape := include "ic.shape" . | fromJson -}}
{{- $rows := (.Files.Get "files/sizing.json" | fromJson).workspaceRows -}}
{{- $tokens := include "ic.maxModelLen" . | int64 -}}
{{- $kv := include "ic.kvBytesPerToken" . | int64 -}}
{{- $gpus := include "ic.gpusPerPod" . | int64 -}}
{{- $weights := div (add (int64 $shape.weightBytes) (sub $gpus 1)) $gpus -}}
{{- $budget := mulf .Values.gpu.memoryGib .Values.engine.gpuMemoryUtilization 1073741824.0 | floor | int64 -}}
{{- $rowBytes := int64 $shape.workspaceRowBytes -}}
{{- $per := int64 $rows.perContextToken -}}
{{- $low := int64 $rows.min -}}
{{- $high := int64 $rows.max -}}
{{- $workspace := add (int64 $shape.workspaceFixedBytes) (mul $rowBytes (min (max (mul $per $tokens) $low) $high)) -}}
{{- $need := add $weights (mul $kv $tokens) $workspace -}}
{{- if gt $need $budget -}}
{{- /* the longest that fits: the workspace grows with the context between two bounds */ -}}
{{- $left := sub $budget (add $weights (int64 $shape.workspaceFixedBytes)) -}}
{{- $fits := div (sub $left (mul $rowBytes $high)) $kv -}}
{{- if lt $fits (div $high $per) -}}
{{- $fits = min (div $left (add $kv (mul $per $rowBytes))) (sub (div $high $per) 1) -}}
{{- if lt $fits (div $low $per) -}}
{{- $fits = div (sub $left (mul $rowBytes $low)) $kv -}}
{{- end -}}
{{- end -}}
{{- $asked := ternary (printf "%d" $tokens) (printf "0, the model's own %d tokens," $tokens) (gt (int64 .Values.engine.maxModelLen) 0) -}}
{{- $remedy := printf "set engine.maxModelLen to at most %d" (int64 $fits) -}}
{{- if lt $fits 1 -}}{{- $remedy = "no context fits: use a larger GPU, a higher engine.tensorParallelSize or quantised weights" -}}{{- end -}}
{{- fail (printf "\n\nengine.maxModelLen is %s and needs %s GiB on each GPU (weights %s, KV cache %s, workspace %s), but gpu.memoryGib %v x engine.gpuMemoryUtilization %v gives %s GiB.\nRemedy: %s; engine.kvCacheDtype fp8 halves the KV cache.\n" $asked (include "ic.gib" $need) (include "ic.gib" $weights) (include "ic.gib" (mul $kv $tokens)) (include "ic.gib" $workspace) .Values.gpu.memoryGib .Values.engine.gpuMemoryUtilization (include "ic.gib" $budget) $remedy) -}}
{{- end -}}
{{- end -}}

{{/* The plugin's own arithmetic (ic_vllm_plugin.cpu_defaults): whole pages, and one that is vLLM's. */}}
{{- define "ic.checkCpuMemory" -}}
{{- $shape := include "ic.shape" . | fromJson -}}
{{- $cpu := (.Files.Get "files/sizing.json" | fromJson).cpu -}}
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
