{{/* Whether the weights come from a volume: "true" or empty. */}}
{{- define "moonshard.hasWeights" -}}
{{- if or .Values.weights.persistentVolumeClaim.enabled .Values.weights.hostPath.enabled -}}true{{- end -}}
{{- end -}}

{{/* The model in the image: see Dockerfile. */}}
{{- define "moonshard.imageModel" -}}/opt/moonshard/models/kimi-nano{{- end -}}

{{- define "moonshard.pricesFolder" -}}/etc/moonshard/prices{{- end -}}

{{/*
Moonshard's configuration as YAML: `config`, and what the chart sets where it says nothing. It goes
through YAML and not through `mergeOverwrite`, which drops keys whose value is null; null is a value
here.
*/}}
{{- define "moonshard.config" -}}
{{- $config := .Values.config | toYaml | fromYaml -}}
{{- range $section := list "model" "gateway" "ledger" "shards" "router" "http" -}}
{{- if not (hasKey $config $section) -}}
{{- $_ := set $config $section dict -}}
{{- end -}}
{{- end -}}
{{- if include "moonshard.hasWeights" . -}}
{{- $path := printf "%s/%s" (trimSuffix "/" .Values.weights.mountPath) .Values.weights.path | trimSuffix "/" -}}
{{- include "moonshard.setDefault" (dict "section" $config.model "key" "path" "value" $path) -}}
{{- end -}}
{{- include "moonshard.setDefault" (dict "section" $config.model "key" "path" "value" (include "moonshard.imageModel" .)) -}}
{{- if .Values.adminKey.enabled -}}
{{- include "moonshard.setDefault" (dict "section" $config.gateway "key" "admin_key" "value" "${MOONSHARD_ADMIN_KEY}") -}}
{{- end -}}
{{- if .Values.ledger.existingSecret -}}
{{- include "moonshard.setDefault" (dict "section" $config.ledger "key" "url" "value" "${MOONSHARD_LEDGER_URL}") -}}
{{- end -}}
{{- include "moonshard.setDefault" (dict "section" $config.ledger "key" "state_dir" "value" .Values.state.mountPath) -}}
{{- if .Values.ledger.prices -}}
{{- $prices := printf "%s/prices.yaml" (include "moonshard.pricesFolder" .) -}}
{{- include "moonshard.setDefault" (dict "section" $config.ledger "key" "prices" "value" $prices) -}}
{{- end -}}
{{- $shard := .Values.shardsGpu.enabled | ternary "moonshard_shard_gpu" "moonshard_shard_cpu" -}}
{{- include "moonshard.setDefault" (dict "section" $config.shards "key" "resources" "value" (dict $shard 1)) -}}
{{- $router := dict "moonshard_router" 0.001 -}}
{{- include "moonshard.setDefault" (dict "section" $config.router "key" "resources" "value" $router) -}}
{{- include "moonshard.setDefault" (dict "section" $config.http "key" "resources" "value" $router) -}}
{{- toYaml $config -}}
{{- end -}}

{{- define "moonshard.setDefault" -}}
{{- if not (hasKey .section .key) -}}
{{- $_ := set .section .key .value -}}
{{- end -}}
{{- end -}}

{{/* Longest time for a request over HTTP, in whole seconds. */}}
{{- define "moonshard.requestTimeout" -}}
{{- if .Values.serve.requestTimeoutSeconds -}}
{{- .Values.serve.requestTimeoutSeconds | ceil | int -}}
{{- else -}}
{{- add (.Values.config.router.request_timeout_s | ceil | int) 60 -}}
{{- end -}}
{{- end -}}

{{/*
What Serve needs after the longest stream has ended, and Ray to stop, with room: a proxy leaves 30 s
after it was told to, at the earliest.
*/}}
{{- define "moonshard.stopMargin" -}}120{{- end -}}

{{/*
Grace period of a pod. It ends as soon as its preStop is through; the period only has to be long
enough. Arguments: `root`, `group`.
*/}}
{{- define "moonshard.gracePeriod" -}}
{{- if .group.terminationGracePeriodSeconds -}}
{{- .group.terminationGracePeriodSeconds | int -}}
{{- else -}}
{{- $stream := .root.Values.config.router.graceful_shutdown_timeout_s | ceil | int -}}
{{- $replacement := dig "replacementSeconds" 0 .group.preStop | int -}}
{{- add $stream $replacement (include "moonshard.stopMargin" .root | int) -}}
{{- end -}}
{{- end -}}

{{/* The Serve config file, whose application is Moonshard. */}}
{{- define "moonshard.serveConfig" -}}
proxy_location: {{ .Values.serve.proxyLocation }}
http_options:
  host: 0.0.0.0
  port: {{ .Values.serve.httpPort | int }}
  request_timeout_s: {{ include "moonshard.requestTimeout" . }}
  keep_alive_timeout_s: {{ .Values.serve.keepAliveTimeoutSeconds | int }}
logging_config:
  log_level: {{ .Values.serve.logLevel }}
  encoding: {{ .Values.serve.logEncoding }}
applications:
  - name: moonshard
    route_prefix: /
    import_path: deployments.app:build
    args:
      {{- include "moonshard.config" . | nindent 6 }}
{{- end -}}
