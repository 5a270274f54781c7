{{/* Labels of what the Prometheus operator selects. */}}
{{- define "ic.monitoring.labels" -}}
{{- include "ic.labels" . }}
{{- with .Values.monitoring.prometheusRelease }}
release: {{ . }}
{{- end }}
{{- with .Values.monitoring.labels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* An endpoint of a ServiceMonitor or PodMonitor: (list $ port job). */}}
{{- define "ic.monitoring.endpoint" -}}
{{- $root := index . 0 -}}
{{- $scrape := $root.Values.monitoring.scrape -}}
{{- if gt (int $scrape.timeoutSeconds) (int $scrape.intervalSeconds) -}}
{{- fail (printf "monitoring.scrape.timeoutSeconds is %v; it must be at most intervalSeconds, %v" $scrape.timeoutSeconds $scrape.intervalSeconds) -}}
{{- end -}}
port: {{ index . 1 }}
path: /metrics
interval: {{ int $scrape.intervalSeconds }}s
scrapeTimeout: {{ int $scrape.timeoutSeconds }}s
relabelings:
  # one name for the job, whichever of the two kinds scrapes: rules and dashboards select by it
  - targetLabel: job
    replacement: {{ index . 2 }}
    action: replace
metricRelabelings:
  # the client library writes a second series per counter and histogram, with the time it was made
  - sourceLabels: [__name__]
    regex: .+_created
    action: drop
  {{- with $scrape.metricRelabelings }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}
