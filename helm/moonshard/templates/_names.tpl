{{/* Name of the chart in labels. */}}
{{- define "moonshard.name" -}}
{{- default .Chart.Name .Values.nameOverride -}}
{{- end -}}

{{/*
Name of the release's objects. At most 33 characters: KubeRay puts six behind it for the cluster, and
cuts a pod's name (cluster, group) off at 50, where `-shards-gpu` must still fit. A longer name is
cut, and gets a hash. Names of Services begin with a letter and have no dots, which names of releases
need not. Two releases in one namespace never get the same: a release called `a-moonshard` is not
shortened to what `a` has.
*/}}
{{- define "moonshard.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride -}}
{{- else -}}
{{- $release := replace "." "-" .Release.Name -}}
{{- $name := include "moonshard.name" . -}}
{{- $full := eq $name $release | ternary $name (printf "%s-%s" $release $name) -}}
{{- if regexMatch "^[^a-z]" $full -}}
{{- $full = printf "m%s" $full -}}
{{- end -}}
{{- if gt (len $full) 33 -}}
{{- $full = printf "%s-%s" ($full | trunc 26 | trimSuffix "-") (sha256sum .Release.Name | trunc 6) -}}
{{- end -}}
{{- $full -}}
{{- end -}}
{{- end -}}

{{- define "moonshard.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "moonshard.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{/* Empty: KubeRay makes one. */}}
{{- define "moonshard.headServiceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (printf "%s-head" (include "moonshard.fullname" .)) .Values.serviceAccount.headName -}}
{{- else -}}
{{- .Values.serviceAccount.headName -}}
{{- end -}}
{{- end -}}

{{- define "moonshard.authSecretName" -}}
{{- default (printf "%s-ray-token" (include "moonshard.fullname" .)) .Values.auth.existingSecret -}}
{{- end -}}

{{- define "moonshard.adminKeySecretName" -}}
{{- default (printf "%s-admin-key" (include "moonshard.fullname" .)) .Values.adminKey.existingSecret -}}
{{- end -}}

{{- define "moonshard.redisName" -}}
{{- printf "%s-redis" (include "moonshard.fullname" .) -}}
{{- end -}}

{{- define "moonshard.redisSecretName" -}}
{{- default (include "moonshard.redisName" .) .Values.redis.existingSecret -}}
{{- end -}}

{{- define "moonshard.scriptsName" -}}
{{- printf "%s-scripts" (include "moonshard.fullname" .) -}}
{{- end -}}

{{- define "moonshard.pricesName" -}}
{{- printf "%s-prices" (include "moonshard.fullname" .) -}}
{{- end -}}

{{- define "moonshard.weightsClaimName" -}}
{{- default (printf "%s-weights" (include "moonshard.fullname" .)) .Values.weights.persistentVolumeClaim.claimName -}}
{{- end -}}

{{- define "moonshard.stateClaimName" -}}
{{- default (printf "%s-state" (include "moonshard.fullname" .)) .Values.state.persistentVolumeClaim.claimName -}}
{{- end -}}

{{/* Whether there is a Redis of the chart's: "true" or empty. */}}
{{- define "moonshard.ownRedis" -}}
{{- if and .Values.redis.enabled (not .Values.redis.external.address) -}}true{{- end -}}
{{- end -}}

{{/*
Secret and key with which metrics are read, and with which `helm test` asks: {"name", "key"} as JSON;
empty where there is none.
*/}}
{{- define "moonshard.metricsKey" -}}
{{- include "moonshard.apiKey" (dict "root" . "secret" .Values.metrics.apiKey) -}}
{{- end -}}

{{- define "moonshard.testKey" -}}
{{- include "moonshard.apiKey" (dict "root" . "secret" .Values.tests) -}}
{{- end -}}

{{- define "moonshard.apiKey" -}}
{{- if .secret.existingSecret -}}
{{- dict "name" .secret.existingSecret "key" .secret.secretKey | toJson -}}
{{- else if .root.Values.adminKey.enabled -}}
{{- dict "name" (include "moonshard.adminKeySecretName" .root) "key" .root.Values.adminKey.secretKey | toJson -}}
{{- end -}}
{{- end -}}

{{/* Whether there is a pod for `helm test`: "true" or empty. */}}
{{- define "moonshard.hasTest" -}}
{{- if and .Values.tests.enabled (include "moonshard.testKey" .) -}}true{{- end -}}
{{- end -}}
