{{/* Security and scheduling of pods. */}}

{{- define "ic.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: {{ .Values.runAs.user | int64 }}
runAsGroup: {{ .Values.runAs.group | int64 }}
fsGroup: {{ .Values.runAs.group | int64 }}
# a volume of weights is not walked through at every start
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "ic.containerSecurityContext" -}}
runAsNonRoot: true
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{/* Top of every pod's spec. */}}
{{- define "ic.podBase" -}}
serviceAccountName: {{ include "ic.serviceAccountName" . }}
automountServiceAccountToken: false
# no variables for every Service of the namespace: vLLM reads what starts with VLLM_
enableServiceLinks: false
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
securityContext:
  {{- include "ic.podSecurityContext" . | nindent 2 }}
{{- end -}}

{{/* Where pods with an engine go. */}}
{{- define "ic.engineScheduling" -}}
{{- if and .Values.gpu.enabled .Values.gpu.runtimeClassName }}
runtimeClassName: {{ .Values.gpu.runtimeClassName }}
{{- end }}
{{- with include "ic.priorityClassName" . }}
priorityClassName: {{ . }}
{{- end }}
{{- with .Values.serving.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.serving.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "ic.priorityClassName" -}}
{{- with .Values.serving.priorityClass -}}
{{- if .create -}}
{{- default (include "ic.fullname" $) .name -}}
{{- else -}}
{{- .name -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* (list $ with-anti-affinity): nodes with enough GPU memory, and replicas apart. */}}
{{- define "ic.affinity" -}}
{{- $root := index . 0 -}}
{{- $apart := index . 1 -}}
{{- if and $root.Values.gpu.enabled $root.Values.gpu.selectNodeByMemory }}
nodeAffinity:
  requiredDuringSchedulingIgnoredDuringExecution:
    nodeSelectorTerms:
      - matchExpressions:
          - key: nvidia.com/gpu.memory
            operator: Gt
            # the label is in MiB, and Gt means more than
            values: [{{ sub (mulf $root.Values.gpu.memoryGib 1024 | floor | int64) 1 | quote }}]
{{- end }}
{{- if and $apart (ne $root.Values.serving.antiAffinity "none") }}
podAntiAffinity:
  {{- if eq $root.Values.serving.antiAffinity "required" }}
  requiredDuringSchedulingIgnoredDuringExecution:
    - topologyKey: kubernetes.io/hostname
      labelSelector:
        matchLabels:
          {{- include "ic.selectorLabels" $root | nindent 10 }}
  {{- else }}
  preferredDuringSchedulingIgnoredDuringExecution:
    - weight: 100
      podAffinityTerm:
        topologyKey: kubernetes.io/hostname
        labelSelector:
          matchLabels:
            {{- include "ic.selectorLabels" $root | nindent 12 }}
  {{- end }}
{{- end }}
{{- end -}}
