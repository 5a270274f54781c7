{{/* Names, labels and small facts that every template shares. */}}

{{- define "ic.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{/* 40 characters leave room for suffixes: a CronJob's name may have 52, what it starts adds 11. */}}
{{- define "ic.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains (include "ic.name" .) .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "ic.name" .) | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* Selectors of the serving pods: the release is in them, so that two releases in one namespace do not mix. */}}
{{- define "ic.selectorLabels" -}}
app.kubernetes.io/name: {{ include "ic.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: serving
{{- end -}}

{{/* Labels of every object that belongs to no component, and of the serving objects: `ic.componentLabels` for others. */}}
{{- define "ic.labels" -}}
{{ include "ic.componentLabels" (list . "serving") }}
{{- end -}}

{{/* Labels of an object of a component: (list $ "batch"). */}}
{{- define "ic.componentLabels" -}}
{{- $root := index . 0 -}}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
app.kubernetes.io/part-of: infinite-context
{{ include "ic.componentSelectorLabels" . }}
{{- with $root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "ic.componentSelectorLabels" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ include "ic.name" $root }}
app.kubernetes.io/instance: {{ $root.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{/* Labels of a component's pods, without versions: a new version of the chart alone restarts no engine. */}}
{{- define "ic.podLabels" -}}
{{ include "ic.componentSelectorLabels" . }}
app.kubernetes.io/part-of: infinite-context
{{- with (index . 0).Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* The string that vLLM takes as `model` in requests and exposes as the label `model_name` of its metrics. */}}
{{- define "ic.servedModelName" -}}
{{- .Values.model.servedName -}}
{{- end -}}

{{/* Port of the API and of /metrics; the port's name is `http` in the pods and in the Service. */}}
{{- define "ic.serving.port" -}}
{{- .Values.serving.port -}}
{{- end -}}

{{- define "ic.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "ic.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{/* An image reference from {repository, tag, digest}: the digest decides, the tag is for readers. */}}
{{- define "ic.image" -}}
{{- printf "%s:%s" .repository .tag -}}
{{- with .digest }}@{{ . }}{{- end -}}
{{- end -}}

{{/* "yes" where something else than this chart sets the number of replicas. */}}
{{- define "ic.autoscaled" -}}
{{- if ne (default "none" (.Values.autoscaling).kind) "none" -}}yes{{- end -}}
{{- end -}}

{{/* The Service that clients use: the router's where there is one. */}}
{{- define "ic.entryName" -}}
{{- include "ic.fullname" . -}}{{- if .Values.router.enabled -}}-router{{- end -}}
{{- end -}}

{{- define "ic.entryPort" -}}
{{- if .Values.router.enabled -}}{{- .Values.router.port -}}{{- else -}}{{- .Values.service.port -}}{{- end -}}
{{- end -}}
