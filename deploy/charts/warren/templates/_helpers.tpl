{{- define "warren.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | quote }}
app.kubernetes.io/name: {{ .name }}
app.kubernetes.io/instance: {{ .root.Release.Name | quote }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/component: {{ .component }}
app.kubernetes.io/part-of: warren
app.kubernetes.io/managed-by: {{ .root.Release.Service | quote }}
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Metadata of one object: {root, name, component}; optional: app (the name label), labels, annotations, clusterScoped. */}}
{{- define "warren.metadata" -}}
name: {{ .name }}
{{- if not .clusterScoped }}
namespace: {{ .root.Release.Namespace }}
{{- end }}
labels:
  {{- include "warren.labels" (dict "root" .root "name" (.app | default .name) "component" .component) | nindent 2 }}
  {{- with .labels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with merge (dict) (.annotations | default dict) .root.Values.commonAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* Never changes, so that an upgrade can keep the selector. */}}
{{- define "warren.selector" -}}
app.kubernetes.io/name: {{ .name }}
app.kubernetes.io/part-of: warren
{{- end }}

{{/* Labels of a pod: {root, name, component, podLabels}. */}}
{{- define "warren.podLabels" -}}
{{- include "warren.selector" . }}
app.kubernetes.io/component: {{ .component }}
app.kubernetes.io/instance: {{ .root.Release.Name | quote }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
{{- with merge (dict) (.podLabels | default dict) .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Annotations of a pod: {root, config, podAnnotations, metricsPort}. A changed file replaces the pods, which read it at their start. */}}
{{- define "warren.podAnnotations" -}}
warren-mesh.io/config-hash: {{ .config | sha256sum | trunc 16 | quote }}
{{- if and .metricsPort .root.Values.monitoring.annotations }}
prometheus.io/scrape: "true"
prometheus.io/port: {{ .metricsPort | quote }}
prometheus.io/path: /metrics
{{- end }}
{{- with merge (dict) (.podAnnotations | default dict) .root.Values.commonAnnotations }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* An image: {root, values, name}. */}}
{{- define "warren.image" -}}
{{- if .values.image -}}
{{ .values.image }}
{{- else -}}
{{ printf "%s/%s:%s" .root.Values.image.registry .name (.root.Values.image.tag | default .root.Chart.AppVersion) }}
{{- end -}}
{{- end }}

{{/* A platform's value, unless the user set another: {root, key}. */}}
{{- define "warren.path" -}}
{{- $platforms := .root.Files.Get "files/platforms.yaml" | fromYaml -}}
{{- index .root.Values.cni .key | default (get (index $platforms (.root.Values.platform | default "kind")) .key) -}}
{{- end }}

{{- define "warren.platform" -}}
{{- $platforms := .root.Files.Get "files/platforms.yaml" | fromYaml -}}
{{- if get (index $platforms (.root.Values.platform | default "kind")) .key }}true{{ end -}}
{{- end }}

{{/* A token for the controller, bound to the pod; kubelet renews it. */}}
{{- define "warren.tokenVolume" -}}
- name: token
  projected:
    sources:
    - serviceAccountToken: { audience: warren-controller, expirationSeconds: 3600, path: token }
{{- end }}

{{- define "warren.nodeEnv" -}}
- name: WARREN_NODE
  valueFrom: { fieldRef: { fieldPath: spec.nodeName } }
{{- end }}

{{/* The three configuration files. Lists and fields of `config` in the values win. */}}
{{- define "warren.controller.config" -}}
{{- $config := dict
  "provider" (dict "kubernetes" (dict))
  "ca" (dict "secret" .Values.controller.rootSecret)
  "trustDomain" .Values.trustDomain
  "mode" .Values.mode
  "log" .Values.logLevel
  "logFormat" .Values.logFormat -}}
{{- mergeOverwrite $config .Values.controller.config | toYaml -}}
{{- end }}

{{- define "warren.cni.config" -}}
{{- $config := dict
  "controller" (include "warren.controllerAccess" . | fromYaml)
  "cni" (dict
    "confDir" (include "warren.path" (dict "root" . "key" "confDir"))
    "binDir" (include "warren.path" (dict "root" . "key" "binDir"))
    "netnsDir" (include "warren.path" (dict "root" . "key" "netnsDir"))
    "procDir" "/host/proc")
  "excludeNamespaces" .Values.cni.excludeNamespaces
  "log" .Values.logLevel
  "logFormat" .Values.logFormat -}}
{{- mergeOverwrite $config .Values.cni.config | toYaml -}}
{{- end }}

{{- define "warren.nodeProxy.config" -}}
{{- $config := dict
  "controller" (include "warren.controllerAccess" . | fromYaml)
  "secretsDir" "/run/warren-proxy/secrets"
  "adminSocket" "/run/warren-proxy/admin.sock"
  "stateDir" "/var/lib/warren/proxy"
  "workers" (int .Values.nodeProxy.workers)
  "terminationGraceSeconds" (int .Values.nodeProxy.terminationGracePeriodSeconds)
  "accessLog" .Values.nodeProxy.accessLog
  "log" .Values.logLevel
  "logFormat" .Values.logFormat -}}
{{- with .Values.nodeProxy.tracingEndpoint -}}
{{- $_ := set $config "tracing" (dict "endpoint" . "sampleRatio" $.Values.nodeProxy.tracingSampleRatio) -}}
{{- end -}}
{{- mergeOverwrite $config .Values.nodeProxy.config | toYaml -}}
{{- end }}

{{- define "warren.controllerAccess" -}}
address: warren-controller.warren-system.svc:15012
trustBundle: /etc/warren/trust/bundle.pem
tokenFile: /var/run/secrets/warren/token
{{- end }}
