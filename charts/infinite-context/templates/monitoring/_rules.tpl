{{/*
Rules are plain YAML in files/rules with <<names>>: PromQL and the alerts' own {{ $labels }} templates stay readable
there, as they would not inside a Helm template. Here the names are filled in and the values' overrides applied.
*/}}

{{/* What each <<name>> stands for, as a YAML mapping. */}}
{{- define "ic.monitoring.names" -}}
{{- $m := .Values.monitoring -}}
{{- $full := include "ic.fullname" . -}}
{{- $t := $m.rules.thresholds -}}
{{- $names := dict
  "target" (printf "namespace=%q, job=%q" .Release.Namespace $full)
  "anyTarget" (printf "namespace=%q, job=~\"%s(-batch)?\"" .Release.Namespace $full)
  "gpu" (printf "%s=%q, %s=~\"%s-.+\"" $m.dcgm.namespaceLabel .Release.Namespace $m.dcgm.podLabel $full)
  "namespace" .Release.Namespace
  "fullname" $full
  "modelName" (include "ic.servedModelName" .)
  "rateWindow" $m.rules.rateWindow
  "ttftSeconds" $m.slo.ttft.seconds
  "interTokenSeconds" $m.slo.interToken.seconds
  "certificateNames" $m.certificate.names
  "certificateNamespaceLabel" $m.certificate.namespaceLabel
  "certificateSeconds" (mul 86400 (int $t.certificateDays) | toString)
  "ttftMin" (int $m.slo.minRequests | toString)
  "interTokenMin" (mul 100 (int $m.slo.minRequests) | toString)
-}}
{{- range $key := list "silentRequests" "waitingRequests" "kvCacheUsage" "preemptions" "errorRatio" "errorMinRequests" "gpuMemoryUsed" "gpuTemperature" "diskFree" -}}
{{- $_ := set $names $key (get $t $key | toString) -}}
{{- end -}}
{{- range $key := list "ttft" "interToken" -}}
{{- $objective := (get $m.slo $key).objective | float64 -}}
{{- $budget := subf 1.0 $objective -}}
{{- if ge (mulf 14.4 $budget) 1.0 -}}
{{- fail (printf "monitoring.slo.%s.objective is %v; it must be above 0.9306, where a burn rate of 14.4 can still be reached" $key $objective) -}}
{{- end -}}
{{- $_ := set $names (printf "%sFast" $key) (round (mulf 14.4 $budget) 6 | toString) -}}
{{- $_ := set $names (printf "%sSlow" $key) (round (mulf 6.0 $budget) 6 | toString) -}}
{{- end -}}
{{- toYaml $names -}}
{{- end -}}

{{/* Names of the files in files/rules that these values ask for. */}}
{{- define "ic.monitoring.ruleFiles" -}}
{{- $m := .Values.monitoring -}}
{{- $files := list "recording" "engine" "volumes" "batch" -}}
{{- if .Values.serving.enabled }}{{ $files = concat $files (list "serving" "slo") }}{{ end -}}
{{- if $m.dcgm.enabled }}{{ $files = append $files "gpu" }}{{ end -}}
{{- if $m.nodes.enabled }}{{ $files = append $files "nodes" }}{{ end -}}
{{- if ne $m.certificate.source "none" }}{{ $files = append $files (printf "certificate-%s" $m.certificate.source) }}{{ end -}}
{{- join " " $files -}}
{{- end -}}

{{/* The rules of one file: (list $ names file), as a YAML mapping with the key `rules`. */}}
{{- define "ic.monitoring.rules" -}}
{{- $root := index . 0 -}}
{{- $text := $root.Files.Get (printf "files/rules/%s.yaml" (index . 2)) -}}
{{- range $name, $value := index . 1 -}}
{{- $text = $text | replace (printf "<<%s>>" $name) $value -}}
{{- end -}}
{{- if contains "<<" $text -}}
{{- fail (printf "files/rules/%s.yaml has a <<name>> that templates/monitoring/_rules.tpl does not know" (index . 2)) -}}
{{- end -}}
{{- $rules := list -}}
{{- $settings := $root.Values.monitoring.rules -}}
{{- range $rule := (fromYaml $text).rules -}}
{{- if not $rule.alert -}}
{{- $rules = append $rules $rule -}}
{{- else if not (has $rule.alert $settings.disabled) -}}
{{- with get $settings.for $rule.alert }}{{ $_ := set $rule "for" . }}{{ end -}}
{{- with get $settings.severity $rule.alert }}{{ $_ := set $rule.labels "severity" . }}{{ end -}}
{{- $_ := set $rule "labels" (merge $rule.labels $settings.alertLabels) -}}
{{- $_ := set $rule.annotations "runbook_url" (printf "%s#%s" $settings.runbookUrl (lower $rule.alert)) -}}
{{- $rules = append $rules $rule -}}
{{- end -}}
{{- end -}}
{{- toYaml (dict "rules" $rules) -}}
{{- end -}}

{{/* An override for an alert that does not exist would be ignored without a word: refused. */}}
{{- define "ic.monitoring.checkOverrides" -}}
{{- $settings := .Values.monitoring.rules -}}
{{- $known := list -}}
{{- range $path, $_ := .Files.Glob "files/rules/*.yaml" -}}
{{- range regexFindAll "(?m)^  - alert: IC[A-Za-z]+" (toString ($.Files.Get $path)) -1 -}}
{{- $known = append $known (trimPrefix "  - alert: " .) -}}
{{- end -}}
{{- end -}}
{{- $known = $known | uniq | sortAlpha -}}
{{- range $key, $names := dict "disabled" $settings.disabled "for" (keys $settings.for) "severity" (keys $settings.severity) -}}
{{- range $name := $names -}}
{{- if not (has $name $known) -}}
{{- fail (printf "monitoring.rules.%s names the alert %q; alerts are: %s" $key $name (join ", " $known)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
