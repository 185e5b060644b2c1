{{/*
Template of a Ray pod. KubeRay adds the command, what authenticates it, its liveness probe and, to
workers, an init container that waits for the head.

Arguments: `root`, `group` (its values), `component` (its label: head, router, shards-...).
*/}}
{{- define "moonshard.rayPod" -}}
{{- $values := .root.Values -}}
{{- $ports := include "moonshard.ports" .root | fromYaml -}}
{{- $image := include "moonshard.image" (dict "root" .root "image" .group.image) -}}
metadata:
  labels:
    {{- include "moonshard.podLabels" (dict "root" .root "component" .component "extra" .group.podLabels) | nindent 4 }}
    {{- /* KubeRay's own, here as well because policies go by it. */}}
    ray.io/node-type: {{ eq .component "head" | ternary "head" "worker" }}
  {{- with .group.podAnnotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  {{- if eq .component "head" }}
  {{- with include "moonshard.headServiceAccountName" .root }}
  serviceAccountName: {{ . | quote }}
  {{- end }}
  {{- else }}
  serviceAccountName: {{ include "moonshard.serviceAccountName" .root | quote }}
  {{- end }}
  automountServiceAccountToken: false
  {{- /* A Service called moonshard would otherwise become variables that begin with MOONSHARD_. */}}
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ include "moonshard.gracePeriod" . }}
  {{- with $values.imagePullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  securityContext:
    {{- toYaml $values.podSecurityContext | nindent 4 }}
  {{- with .group.priorityClassName }}
  priorityClassName: {{ . | quote }}
  {{- end }}
  {{- with .group.runtimeClassName }}
  runtimeClassName: {{ . | quote }}
  {{- end }}
  {{- with .group.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .group.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .group.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- if .group.topologySpreadConstraints }}
  topologySpreadConstraints:
    {{- include "moonshard.spread" . | nindent 4 }}
  {{- end }}
  containers:
    - name: {{ eq .component "head" | ternary "ray-head" "ray-worker" }}
      image: {{ $image | quote }}
      imagePullPolicy: {{ $values.image.pullPolicy }}
      securityContext:
        {{- toYaml $values.containerSecurityContext | nindent 8 }}
      resources:
        {{- toYaml .group.resources | nindent 8 }}
      env:
        {{- include "moonshard.env" . | trim | nindent 8 }}
      ports:
        - {name: metrics, containerPort: {{ $ports.metrics }}}
        {{- if eq .component "head" }}
        - {name: gcs-server, containerPort: {{ $ports.gcs }}}
        - {name: dashboard, containerPort: {{ $ports.dashboard }}}
        {{- end }}
        {{- if has .component (list "head" "router") }}
        - {name: serve, containerPort: {{ $values.serve.httpPort | int }}}
        {{- end }}
      {{- with include "moonshard.probes" . }}
      {{- . | nindent 6 }}
      {{- end }}
      {{- with include "moonshard.preStop" . }}
      lifecycle:
        preStop:
          exec:
            command: {{ . }}
      {{- end }}
      volumeMounts:
        {{- include "moonshard.volumeMounts" . | nindent 8 }}
  volumes:
    {{- include "moonshard.volumes" . | nindent 4 }}
{{- end -}}

{{/*
Probes, beside KubeRay's own of liveness. A router pod counts as started when the application takes
requests through its proxy, so that nobody is sent to a cluster that still loads; from then on it is
ready while its proxy takes requests, also when the head is away (KubeRay's probe would ask for Ray's
health as well) or experts are missing (the gateway says so, with 503). A shard pod has no proxy, and
is ready once its Ray node runs. The head's are KubeRay's.
*/}}
{{- define "moonshard.probes" -}}
{{- if eq .component "router" -}}
startupProbe:
  httpGet: {path: /ready, port: serve}
  periodSeconds: 5
  timeoutSeconds: 5
  {{- /* A day: loading takes as long as it takes, and `start_timeout_s` ends what hangs. */}}
  failureThreshold: 17280
readinessProbe:
  httpGet: {path: /-/healthz, port: serve}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 2
{{- else if ne .component "head" -}}
readinessProbe:
  httpGet: {path: /api/healthz, port: {{ (include "moonshard.ports" .root | fromYaml).dashboardAgent }}}
  initialDelaySeconds: 10
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
{{- end -}}
{{- end -}}

{{/*
Command before a pod's containers are told to stop, as JSON; empty for none. Ray ends by itself then:
the shell that KubeRay starts it with hands over to it.
*/}}
{{- define "moonshard.preStop" -}}
{{- if .group.preStop.command -}}
{{- toJson .group.preStop.command -}}
{{- else if eq .component "router" -}}
{{- $seconds := sub (include "moonshard.gracePeriod" . | int) 60 -}}
{{- list "python" (printf "%s/drain.py" (include "moonshard.scriptsFolder" .root)) "--seconds" (toString $seconds) | toJson -}}
{{- end -}}
{{- end -}}
