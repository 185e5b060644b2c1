{{/* Ports of Ray's processes, fixed so that policies can name them. */}}
{{- define "moonshard.ports" -}}
gcs: 6379
nodeManager: 6380
objectManager: 6381
runtimeEnvAgent: 6382
dashboardAgentGrpc: 6383
metrics: 8080
dashboard: 8265
firstWorker: 10002
lastWorker: 19999
dashboardAgent: 52365
{{- end -}}

{{- define "moonshard.home" -}}/home/moonshard{{- end -}}
{{- define "moonshard.cacheFolder" -}}/var/cache/moonshard{{- end -}}
{{- define "moonshard.scriptsFolder" -}}/etc/moonshard/scripts{{- end -}}

{{/* Arguments of `ray start`. Arguments: `root`, `group`, `component`. */}}
{{- define "moonshard.rayStartParams" -}}
{{- $ports := include "moonshard.ports" .root | fromYaml -}}
{{- $params := dict
      "node-manager-port" ($ports.nodeManager | toString)
      "object-manager-port" ($ports.objectManager | toString)
      "runtime-env-agent-port" ($ports.runtimeEnvAgent | toString)
      "dashboard-agent-grpc-port" ($ports.dashboardAgentGrpc | toString)
      "dashboard-agent-listen-port" ($ports.dashboardAgent | toString)
      "metrics-export-port" ($ports.metrics | toString)
      "min-worker-port" ($ports.firstWorker | toString)
      "max-worker-port" ($ports.lastWorker | toString)
      "object-store-memory" (.group.objectStoreMemoryBytes | int64 | toString) -}}
{{- if eq .component "head" -}}
{{- $params = merge $params (dict
      "num-cpus" "0"
      "num-gpus" "0"
      "port" ($ports.gcs | toString)
      "dashboard-host" "0.0.0.0"
      "dashboard-port" ($ports.dashboard | toString)) -}}
{{- else -}}
{{- if not (kindIs "invalid" .group.numCpus) -}}
{{- $_ := set $params "num-cpus" (.group.numCpus | int | toString) -}}
{{- end -}}
{{- with .group.rayResources -}}
{{/* The quotes are for the shell; Ray's autoscaler takes off one character at each end. */}}
{{- $_ := set $params "resources" (printf "'%s'" (toJson .)) -}}
{{- end -}}
{{- end -}}
{{- toYaml (merge (dict) (.group.rayStartParams | default dict) $params) -}}
{{- end -}}

{{/*
Environment of a container that runs Moonshard or Ray. Arguments: `root`, `group`, `component`.
*/}}
{{- define "moonshard.env" -}}
{{- $cache := include "moonshard.cacheFolder" .root -}}
{{- $env := dict
      "HOME" (include "moonshard.home" .root)
      "USER" "moonshard"
      "PYTHONDONTWRITEBYTECODE" "1"
      "XDG_CACHE_HOME" $cache
      "VLLM_CACHE_ROOT" (printf "%s/vllm" $cache)
      "TORCHINDUCTOR_CACHE_DIR" (printf "%s/torchinductor" $cache)
      "TRITON_CACHE_DIR" (printf "%s/triton" $cache)
      "CUDA_CACHE_PATH" (printf "%s/cuda" $cache)
      "FLASHINFER_WORKSPACE_BASE" $cache
      "HF_HOME" (printf "%s/huggingface" $cache)
      "HF_HUB_OFFLINE" "1"
      "TRANSFORMERS_OFFLINE" "1"
      "VLLM_NO_USAGE_STATS" "1"
      "DO_NOT_TRACK" "1" -}}
{{- $env = merge (dict) .root.Values.rayService.environment $env -}}
{{- $own := list -}}
{{- range .group.extraEnv -}}
{{- $own = append $own .name -}}
{{- end -}}
{{- range $name, $value := $env -}}
{{- if not (has $name $own) }}
- name: {{ $name | quote }}
  value: {{ $value | quote }}
{{- end -}}
{{- end -}}
{{- with .group.extraEnv }}
{{ toYaml . }}
{{- end -}}
{{- if eq .component "router" }}
{{- if and .root.Values.adminKey.enabled (not (has "MOONSHARD_ADMIN_KEY" $own)) }}
- name: MOONSHARD_ADMIN_KEY
  valueFrom:
    secretKeyRef:
      name: {{ include "moonshard.adminKeySecretName" .root | quote }}
      key: {{ .root.Values.adminKey.secretKey | quote }}
{{- end }}
{{- if not (has "MOONSHARD_LEDGER_URL" $own) }}
- name: MOONSHARD_LEDGER_URL
  {{- include "moonshard.ledgerUrl" .root | nindent 2 }}
{{- end }}
{{- end -}}
{{- end -}}

{{/*
Where the ledger is: for the gateway, and for `moonshard keys` in a shell of the pod. A URL of
`config` may name variables as ${NAME}; Kubernetes fills in $(NAME), of those that stand before it.
*/}}
{{- define "moonshard.ledgerUrl" -}}
{{- $ledger := (include "moonshard.config" . | fromYaml).ledger -}}
{{- if .Values.ledger.existingSecret -}}
valueFrom:
  secretKeyRef:
    name: {{ .Values.ledger.existingSecret | quote }}
    key: {{ .Values.ledger.urlKey | quote }}
{{- else if $ledger.url -}}
value: {{ regexReplaceAll "\\$\\{(\\w+)\\}" $ledger.url "$$(${1})" | quote }}
{{- else -}}
value: {{ printf "sqlite:///%s/ledger.db" (trimSuffix "/" $ledger.state_dir) | quote }}
{{- end -}}
{{- end -}}

{{/* Volumes of a Ray pod. Arguments: `root`, `group`, `component`. */}}
{{- define "moonshard.volumes" -}}
{{- $values := .root.Values -}}
- name: shared-mem
  emptyDir: {medium: Memory, sizeLimit: {{ toJson .group.shmSize }}}
- name: ray-logs
  emptyDir: {sizeLimit: {{ toJson .group.tmpSize }}}
- name: tmp
  emptyDir: {sizeLimit: {{ toJson .group.tmpSize }}}
- name: home
  emptyDir: {sizeLimit: 1Gi}
- name: cache
{{- $hostPath := dig "cache" "hostPath" "" .group }}
{{- if $hostPath }}
  hostPath: {path: {{ $hostPath | quote }}, type: Directory}
{{- else }}
  emptyDir: {sizeLimit: {{ dig "cache" "size" "1Gi" .group | toJson }}}
{{- end }}
{{- if $values.weights.persistentVolumeClaim.enabled }}
- name: weights
  persistentVolumeClaim: {claimName: {{ include "moonshard.weightsClaimName" .root | quote }}, readOnly: true}
{{- else if $values.weights.hostPath.enabled }}
- name: weights
  hostPath: {path: {{ $values.weights.hostPath.path | quote }}, type: Directory}
{{- end }}
{{- if eq .component "head" }}
{{- if $values.autoscaler.enabled }}
{{- /* For the autoscaler's container alone: a token that the rest of the pod does not see. */}}
- name: autoscaler-token
  projected:
    sources:
      - serviceAccountToken: {path: token, expirationSeconds: 3607}
      - configMap:
          name: kube-root-ca.crt
          items: [{key: ca.crt, path: ca.crt}]
          optional: true
{{- end }}
{{- else if eq .component "router" }}
- name: state
{{- if eq $values.state.type "persistentVolumeClaim" }}
  persistentVolumeClaim: {claimName: {{ include "moonshard.stateClaimName" .root | quote }}}
{{- else if eq $values.state.type "hostPath" }}
  hostPath: {path: {{ $values.state.hostPath | quote }}, type: Directory}
{{- else }}
  emptyDir: {sizeLimit: {{ toJson $values.state.size }}}
{{- end }}
- name: scripts
  configMap: {name: {{ include "moonshard.scriptsName" .root }}}
{{- if $values.ledger.prices }}
- name: prices
  configMap: {name: {{ include "moonshard.pricesName" .root }}}
{{- end }}
{{- end }}
{{- with .group.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* What the Ray container mounts. Arguments: `root`, `group`, `component`. */}}
{{- define "moonshard.volumeMounts" -}}
{{- $values := .root.Values -}}
- {name: shared-mem, mountPath: /dev/shm}
- {name: tmp, mountPath: /tmp}
- {name: ray-logs, mountPath: /tmp/ray}
- {name: home, mountPath: {{ include "moonshard.home" .root }}}
- {name: cache, mountPath: {{ include "moonshard.cacheFolder" .root }}}
{{- if include "moonshard.hasWeights" .root }}
- name: weights
  mountPath: {{ $values.weights.mountPath | quote }}
  readOnly: true
{{- if and $values.weights.persistentVolumeClaim.enabled $values.weights.persistentVolumeClaim.subPath }}
  subPath: {{ $values.weights.persistentVolumeClaim.subPath | quote }}
{{- end }}
{{- end }}
{{- if eq .component "router" }}
- {name: state, mountPath: {{ $values.state.mountPath | quote }}}
- {name: scripts, mountPath: {{ include "moonshard.scriptsFolder" .root }}, readOnly: true}
{{- if $values.ledger.prices }}
- {name: prices, mountPath: {{ include "moonshard.pricesFolder" .root }}, readOnly: true}
{{- end }}
{{- end }}
{{- with .group.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Spread constraints; one without a selector is about its own group's pods. */}}
{{- define "moonshard.spread" -}}
{{- $selector := dict "matchLabels" (include "moonshard.selector" . | fromYaml) -}}
{{- $constraints := list -}}
{{- range .group.topologySpreadConstraints -}}
{{- $constraints = append $constraints (merge (dict) . (dict "labelSelector" $selector)) -}}
{{- end -}}
{{- toYaml $constraints -}}
{{- end -}}
