{{/* A group of workers. Arguments: `root`, `group`, `name`. */}}
{{- define "moonshard.workerGroup" -}}
{{- $pod := dict "root" .root "group" .group "component" .name -}}
- groupName: {{ .name }}
  replicas: {{ .group.replicas | int }}
  minReplicas: {{ .group.minReplicas | int }}
  maxReplicas: {{ .group.maxReplicas | int }}
  rayStartParams:
    {{- include "moonshard.rayStartParams" $pod | nindent 4 }}
  template:
    {{- include "moonshard.rayPod" $pod | nindent 4 }}
{{- end -}}

{{/* What keeps the head's tables when it is lost. */}}
{{- define "moonshard.faultTolerance" -}}
{{- $external := .Values.redis.external -}}
{{- if $external.address -}}
gcsFaultToleranceOptions:
  redisAddress: {{ $external.address | quote }}
  {{- with $external.username }}
  redisUsername:
    value: {{ . | quote }}
  {{- end }}
  {{- if $external.existingSecret }}
  redisPassword:
    valueFrom:
      secretKeyRef:
        name: {{ $external.existingSecret | quote }}
        key: {{ $external.passwordKey | quote }}
  {{- end }}
{{- else if .Values.redis.enabled -}}
gcsFaultToleranceOptions:
  redisAddress: {{ printf "%s:6379" (include "moonshard.redisName" .) | quote }}
  redisPassword:
    valueFrom:
      secretKeyRef:
        name: {{ include "moonshard.redisSecretName" . | quote }}
        key: {{ .Values.redis.passwordKey | quote }}
{{- end -}}
{{- end -}}

{{- define "moonshard.autoscaler" -}}
{{- $autoscaler := .Values.autoscaler -}}
enableInTreeAutoscaling: {{ $autoscaler.enabled }}
{{- if $autoscaler.enabled }}
autoscalerOptions:
  version: {{ $autoscaler.version }}
  idleTimeoutSeconds: {{ $autoscaler.idleTimeoutSeconds | int }}
  upscalingMode: {{ $autoscaler.upscalingMode }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  resources:
    {{- toYaml $autoscaler.resources | nindent 4 }}
  securityContext:
    {{- toYaml .Values.containerSecurityContext | nindent 4 }}
  env:
    - {name: HOME, value: {{ include "moonshard.home" . }}}
    - {name: PYTHONDONTWRITEBYTECODE, value: "1"}
    - {name: RAY_USAGE_STATS_ENABLED, value: "0"}
  volumeMounts:
    - {name: tmp, mountPath: /tmp}
    - {name: ray-logs, mountPath: /tmp/ray}
    - {name: home, mountPath: {{ include "moonshard.home" . }}}
    - {name: autoscaler-token, mountPath: /var/run/secrets/kubernetes.io/serviceaccount, readOnly: true}
{{- end }}
{{- end -}}
