{{/*
The two demands, as PromQL with one element each: sums over the replicas, which the autoscaler divides by the number of
replicas (AverageValue). A replica that still loads its model counts as one with no load, so a start is not answered by
another start. A mean with a Value target would be multiplied by replicas that do not serve yet.
*/}}

{{- define "ic.autoscaling.selector" -}}
namespace={{ .Release.Namespace | quote }}, job={{ include "ic.fullname" . | quote }}, model_name={{ include "ic.servedModelName" . | quote }}
{{- end -}}

{{- define "ic.autoscaling.waitingQuery" -}}
sum(vllm:num_requests_waiting{ {{- include "ic.autoscaling.selector" . -}} })
{{- end -}}

{{- define "ic.autoscaling.kvQuery" -}}
sum(vllm:kv_cache_usage_perc{ {{- include "ic.autoscaling.selector" . -}} })
{{- end -}}

{{/* HPA behaviour, the same for both kinds. */}}
{{- define "ic.autoscaling.behavior" -}}
{{- $a := .Values.autoscaling -}}
scaleUp:
  stabilizationWindowSeconds: {{ int $a.scaleUp.stabilizationSeconds }}
  policies:
    - type: Pods
      value: {{ int $a.scaleUp.pods }}
      periodSeconds: {{ int $a.scaleUp.periodSeconds }}
scaleDown:
  stabilizationWindowSeconds: {{ int $a.scaleDown.stabilizationSeconds }}
  policies:
    - type: Pods
      value: {{ int $a.scaleDown.pods }}
      periodSeconds: {{ int $a.scaleDown.periodSeconds }}
{{- end -}}

{{/* What cannot work is refused here, with the field, its value and what is accepted. */}}
{{- define "ic.autoscaling.check" -}}
{{- $a := .Values.autoscaling -}}
{{- if not .Values.serving.enabled -}}
{{- fail (printf "autoscaling.kind is %q and serving.enabled is false; there is nothing to scale, use none" $a.kind) -}}
{{- end -}}
{{- if lt (int $a.maxReplicas) (int $a.minReplicas) -}}
{{- fail (printf "autoscaling.maxReplicas is %v; it must be at least minReplicas, %v" $a.maxReplicas $a.minReplicas) -}}
{{- end -}}
{{- $grace := int .Values.serving.drain.gracePeriodSeconds -}}
{{- if lt (int $a.scaleDown.periodSeconds) $grace -}}
{{- fail (printf "autoscaling.scaleDown.periodSeconds is %v; it must be at least serving.drain.gracePeriodSeconds, %d, so that what is removed has drained before more is removed" $a.scaleDown.periodSeconds $grace) -}}
{{- end -}}
{{- if not (and (.Values.monitoring).enabled (ne .Values.monitoring.scrape.kind "none")) -}}
{{- fail (printf "autoscaling.kind is %q, which reads what Prometheus scrapes; set monitoring.enabled to true and monitoring.scrape.kind to pod or service" $a.kind) -}}
{{- end -}}
{{- if $a.scaleToZero.enabled -}}
{{- if ne $a.kind "keda" -}}
{{- fail (printf "autoscaling.scaleToZero.enabled needs autoscaling.kind keda, not %q: a HorizontalPodAutoscaler stops at one replica" $a.kind) -}}
{{- end -}}
{{- if not $a.scaleToZero.demandQuery -}}
{{- fail "autoscaling.scaleToZero.demandQuery is empty; give PromQL with one element from a router or from Traefik, above 0 while somebody wants an answer: with no replica there are no vllm: metrics, and nothing would ever start one" -}}
{{- end -}}
{{- if contains "vllm:" $a.scaleToZero.demandQuery -}}
{{- fail (printf "autoscaling.scaleToZero.demandQuery is %q; metrics of vLLM end with the last replica and cannot bring it back, use those of a router or of Traefik" $a.scaleToZero.demandQuery) -}}
{{- end -}}
{{- if lt (int $a.scaleToZero.cooldownSeconds) $grace -}}
{{- fail (printf "autoscaling.scaleToZero.cooldownSeconds is %v; it must be at least serving.drain.gracePeriodSeconds, %d" $a.scaleToZero.cooldownSeconds $grace) -}}
{{- end -}}
{{- end -}}
{{- $fallback := int $a.keda.fallbackReplicas -}}
{{- if and (eq $a.kind "keda") (ne $fallback 0) (or (lt $fallback (int $a.minReplicas)) (gt $fallback (int $a.maxReplicas))) -}}
{{- fail (printf "autoscaling.keda.fallbackReplicas is %d; it must be 0 or lie between minReplicas, %v, and maxReplicas, %v" $fallback $a.minReplicas $a.maxReplicas) -}}
{{- end -}}
{{- end -}}
