{{/* What every pod that runs vLLM has in common: model, flags, environment, volumes. */}}

{{- define "ic.gpusPerPod" -}}
{{- mul .Values.engine.tensorParallelSize .Values.engine.pipelineParallelSize -}}
{{- end -}}

{{/* Folder of the checkpoint in the container. */}}
{{- define "ic.modelPath" -}}
{{- if eq .Values.model.source "baked" -}}
{{- default "/models/ic-nano" .Values.model.path -}}
{{- else -}}
{{- list "/models/volume" (trimAll "/" .Values.model.path) | join "/" | trimSuffix "/" -}}
{{- end -}}
{{- end -}}

{{/* Flags that `vllm serve` and `vllm run-batch` share, as a YAML list. */}}
{{- define "ic.engineArgs" -}}
{{- $engine := .Values.engine -}}
- --served-model-name
- {{ include "ic.servedModelName" . | quote }}
- --max-model-len
- {{ include "ic.maxModelLen" . | quote }}
- --dtype
- {{ $engine.dtype }}
{{- with $engine.quantization }}
- --quantization
- {{ . }}
{{- end }}
{{- if ne $engine.kvCacheDtype "auto" }}
- --kv-cache-dtype
- {{ $engine.kvCacheDtype }}
{{- end }}
{{- if .Values.gpu.enabled }}
- --gpu-memory-utilization
- {{ $engine.gpuMemoryUtilization | quote }}
{{- end }}
{{- if gt (int $engine.tensorParallelSize) 1 }}
- --tensor-parallel-size
- {{ $engine.tensorParallelSize | quote }}
{{- end }}
{{- if gt (int $engine.pipelineParallelSize) 1 }}
- --pipeline-parallel-size
- {{ $engine.pipelineParallelSize | quote }}
{{- end }}
{{- if gt (int $engine.maxNumSeqs) 0 }}
- --max-num-seqs
- {{ $engine.maxNumSeqs | quote }}
{{- end }}
{{- if gt (int $engine.maxNumBatchedTokens) 0 }}
- --max-num-batched-tokens
- {{ $engine.maxNumBatchedTokens | quote }}
{{- end }}
{{- if .Values.model.loraAdapters }}
- --enable-lora
- --max-lora-rank
- {{ .Values.model.loraMaxRank | quote }}
- --lora-modules
{{- range .Values.model.loraAdapters }}
- {{ printf "%s=%s" .name .path | quote }}
{{- end }}
{{- end }}
{{- with $engine.extraArgs }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* The root file system is read-only: whatever vLLM, Triton and Inductor write goes below /tmp. */}}
{{- define "ic.engineEnv" -}}
- name: HOME
  value: /tmp
- name: USER
  value: vllm
- name: XDG_CACHE_HOME
  value: /tmp/cache
- name: VLLM_CACHE_ROOT
  value: /tmp/cache/vllm
- name: TRITON_CACHE_DIR
  value: /tmp/cache/triton
- name: TORCHINDUCTOR_CACHE_DIR
  value: /tmp/cache/inductor
- name: HF_HOME
  value: /tmp/cache/huggingface
- name: HF_HUB_OFFLINE
  value: "1"
- name: VLLM_NO_USAGE_STATS
  value: "1"
{{- if not .Values.gpu.enabled }}
- name: VLLM_CPU_KVCACHE_SPACE
  value: {{ .Values.cpu.kvCacheGib | quote }}
{{- end }}
{{- with .Values.engine.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "ic.engineVolumeMounts" -}}
- name: scratch
  mountPath: /tmp
{{- if .Values.serving.cacheHostPath }}
- name: cache
  mountPath: /tmp/cache
{{- end }}
- name: shm
  mountPath: /dev/shm
{{- if ne .Values.model.source "baked" }}
- name: model
  mountPath: /models/volume
  readOnly: true
{{- end }}
{{- end -}}

{{- define "ic.engineVolumes" -}}
- name: scratch
  emptyDir:
    sizeLimit: {{ .Values.serving.scratch }}
{{- with .Values.serving.cacheHostPath }}
- name: cache
  hostPath:
    path: {{ . }}
    type: Directory
{{- end }}
- name: shm
  emptyDir:
    medium: Memory
    sizeLimit: {{ .Values.serving.sharedMemory }}
{{- include "ic.modelVolume" . }}
{{- end -}}

{{- define "ic.modelVolume" -}}
{{- if ne .Values.model.source "baked" }}
- name: model
  {{- if eq .Values.model.source "hostPath" }}
  hostPath:
    path: {{ .Values.model.hostPath.path }}
    type: Directory
  {{- else if .Values.model.pvc.existingClaim }}
  persistentVolumeClaim:
    claimName: {{ .Values.model.pvc.existingClaim }}
  {{- else }}
  emptyDir:
    sizeLimit: {{ .Values.model.download.sizeLimit }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* Init container that fetches the checkpoint, for source `download`. */}}
{{- define "ic.downloadContainer" -}}
- name: download-model
  image: {{ include "ic.image" .Values.image }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  command: [python3, /scripts/download.py, --files, /scripts/files.json, --folder, {{ include "ic.modelPath" . | quote }}]
  {{- with .Values.model.download.tokenSecret }}
  {{- if .name }}
  env:
    - name: DOWNLOAD_TOKEN
      valueFrom:
        secretKeyRef:
          name: {{ .name }}
          key: {{ .key }}
  {{- end }}
  {{- end }}
  resources:
    requests: {cpu: 100m, memory: 128Mi}
    limits: {memory: 512Mi}
  securityContext:
    {{- include "ic.containerSecurityContext" . | nindent 4 }}
  volumeMounts:
    - name: model
      mountPath: /models/volume
    - name: download
      mountPath: /scripts
      readOnly: true
{{- end -}}

{{- define "ic.downloadVolume" -}}
- name: download
  configMap:
    name: {{ include "ic.fullname" . }}-download
{{- end -}}

{{/* Requests and limits of an engine's container: (list $ .Values.serving.resources). */}}
{{- define "ic.engineResources" -}}
{{- $root := index . 0 -}}
{{- $resources := deepCopy (index . 1) -}}
{{- if $root.Values.gpu.enabled -}}
{{- $gpus := dict $root.Values.gpu.resourceName (include "ic.gpusPerPod" $root | int) -}}
{{- $_ := set $resources "limits" (merge (dict) $gpus (default (dict) $resources.limits)) -}}
{{- $_ := set $resources "requests" (merge (dict) $gpus (default (dict) $resources.requests)) -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}
