{{/* Spec of the Job, alone or inside a CronJob. */}}
{{- define "ic.batchJobSpec" -}}
{{- $batch := .Values.batch -}}
backoffLimit: {{ $batch.backoffLimit }}
{{- with $batch.activeDeadlineSeconds }}
activeDeadlineSeconds: {{ . }}
{{- end }}
ttlSecondsAfterFinished: {{ $batch.ttlSecondsAfterFinished | int64 }}
podFailurePolicy:
  rules:
    # dead letters do not come alive by trying again
    - action: FailJob
      onExitCodes: {containerName: run-batch, operator: In, values: [3]}
    # a drained node is no failure of the batch: it goes on elsewhere
    - action: Ignore
      onPodConditions:
        - type: DisruptionTarget
          status: "True"
template:
  metadata:
    labels:
      {{- include "ic.podLabels" (list . "batch") | nindent 6 }}
    annotations:
      kubectl.kubernetes.io/default-container: run-batch
  spec:
    {{- include "ic.podBase" . | nindent 4 }}
    {{- include "ic.engineScheduling" . | trim | nindent 4 }}
    {{- with include "ic.affinity" (list . false) | trim }}
    affinity:
      {{- . | nindent 6 }}
    {{- end }}
    restartPolicy: Never
    # vLLM ends within seconds; the object store gets its last copy
    terminationGracePeriodSeconds: 60
    {{- if or $batch.objectStore.enabled (eq .Values.model.source "download") }}
    initContainers:
      {{- if eq .Values.model.source "download" }}
      {{- include "ic.downloadContainer" . | nindent 6 }}
      {{- end }}
      {{- if $batch.objectStore.enabled }}
      {{- include "ic.objectStoreContainers" . | nindent 6 }}
      {{- end }}
    {{- end }}
    containers:
      - name: run-batch
        image: {{ include "ic.image" .Values.image }}
        imagePullPolicy: {{ .Values.image.pullPolicy }}
        command:
          - python3
          - /scripts/run_batch.py
          - --folder
          - /data
          - --chunk-requests
          - {{ $batch.chunkRequests | int64 | quote }}
          - --max-attempts
          - {{ $batch.maxAttempts | quote }}
          {{- if $batch.failOnDeadLetters }}
          - --fail-on-dead-letters
          {{- end }}
          - --
        args:
          - vllm
          - run-batch
          - --model
          - {{ include "ic.modelPath" . | quote }}
          - --enable-metrics
          - --port
          - {{ $batch.metricsPort | quote }}
          {{- include "ic.engineArgs" . | nindent 10 }}
          {{- with $batch.chatTemplate }}
          - --chat-template
          - {{ . | quote }}
          {{- end }}
          {{- with $batch.extraArgs }}
          {{- toYaml . | nindent 10 }}
          {{- end }}
        env:
          {{- include "ic.engineEnv" . | nindent 10 }}
        ports:
          - name: metrics
            containerPort: {{ $batch.metricsPort }}
        resources:
          {{- include "ic.engineResources" (list . $batch.resources) | nindent 10 }}
        securityContext:
          {{- include "ic.containerSecurityContext" . | nindent 10 }}
        volumeMounts:
          {{- include "ic.engineVolumeMounts" . | nindent 10 }}
          - name: data
            mountPath: /data
          - name: scripts
            mountPath: /scripts
            readOnly: true
    volumes:
      {{- include "ic.engineVolumes" . | nindent 6 }}
      {{- if eq .Values.model.source "download" }}
      {{- include "ic.downloadVolume" . | nindent 6 }}
      {{- end }}
      - name: data
        persistentVolumeClaim:
          claimName: {{ default (printf "%s-batch" (include "ic.fullname" .)) $batch.storage.existingClaim }}
      - name: scripts
        configMap:
          name: {{ include "ic.fullname" . }}-batch
      {{- if $batch.objectStore.enabled }}
      - name: rclone
        secret:
          secretName: {{ $batch.objectStore.configSecret }}
      {{- end }}
{{- end -}}

{{/*
Before: copy what the store has, earlier results included. While it runs, and once more at its end: copy results back.
`copy` deletes nothing on either side. The second is a native sidecar, which ends after the main container.
*/}}
{{- define "ic.objectStoreContainers" -}}
{{- $store := .Values.batch.objectStore -}}
{{- range $name, $command := dict
  "fetch-batch" (list "rclone" "copy" $store.remote "/data" "--update" "--verbose")
  "store-results" (list "sh" "/scripts/store_results.sh" "/data" $store.remote (toString $store.intervalSeconds))
}}
- name: {{ $name }}
  image: {{ include "ic.image" $store.image }}
  imagePullPolicy: {{ $.Values.image.pullPolicy }}
  {{- if eq $name "store-results" }}
  restartPolicy: Always
  {{- end }}
  command: {{ toJson $command }}
  env:
    - name: RCLONE_CONFIG
      value: /rclone/rclone.conf
    - name: HOME
      value: /tmp
  resources:
    requests: {cpu: 100m, memory: 128Mi}
    limits: {memory: 512Mi}
  securityContext:
    {{- include "ic.containerSecurityContext" $ | nindent 4 }}
  volumeMounts:
    - {name: data, mountPath: /data}
    - {name: scratch, mountPath: /tmp}
    - {name: rclone, mountPath: /rclone, readOnly: true}
    - {name: scripts, mountPath: /scripts, readOnly: true}
{{- end }}
{{- end -}}
