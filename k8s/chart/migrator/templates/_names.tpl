{{/* Names and labels. */}}

{{- define "migrator.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 38 | trimSuffix "-" -}}
{{- end -}}

{{- define "migrator.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 38 | trimSuffix "-" -}}
{{- else if contains (include "migrator.name" .) .Release.Name -}}
{{- .Release.Name | trunc 38 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "migrator.name" .) | trunc 38 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "migrator.selectorLabels" -}}
app.kubernetes.io/name: {{ include "migrator.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "migrator.labels" -}}
{{ include "migrator.selectorLabels" . }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{- with .Values.image.tag }}
app.kubernetes.io/version: {{ . | trunc 63 | trimSuffix "-" | trimSuffix "." | quote }}
{{- end }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "migrator.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "migrator.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{/* A Job that is a hook has an account and a NetworkPolicy of its own: Helm and Argo CD delete hooks and make them
     again, and do not let a hook become a part of the release, nor the other way round. */}}
{{- define "migrator.isHook" -}}
{{- if has .Values.mode (list "hook" "argocd") }}true{{ end -}}
{{- end -}}

{{- define "migrator.hookServiceAccountName" -}}
{{- include "migrator.serviceAccountName" . -}}
{{- if and .Values.serviceAccount.create (include "migrator.isHook" .) }}-hook{{ end -}}
{{- end -}}

{{- define "migrator.claimName" -}}
{{- default (printf "%s-backups" (include "migrator.fullname" .)) .Values.backups.claim.existingClaim -}}
{{- end -}}

{{- define "migrator.image" -}}
{{- $image := .Values.image -}}
{{- $image.repository -}}
{{- with $image.tag }}:{{ . }}{{ end -}}
{{- with $image.digest }}@{{ . }}{{ end -}}
{{- end -}}

{{/* What a hook needs is made before it. */}}
{{- define "migrator.hookAnnotations" -}}
{{- if eq .Values.mode "hook" -}}
helm.sh/hook: {{ join "," .Values.hook.events }}
helm.sh/hook-weight: {{ sub (int .Values.hook.weight) 10 | quote }}
helm.sh/hook-delete-policy: before-hook-creation
{{- else if eq .Values.mode "argocd" -}}
argocd.argoproj.io/hook: PreSync
argocd.argoproj.io/hook-delete-policy: BeforeHookCreation
argocd.argoproj.io/sync-wave: {{ sub (int .Values.argocd.preSync.wave) 1 | quote }}
{{- end -}}
{{- end -}}
