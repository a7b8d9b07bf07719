{{/* Names and labels. Every name is quoted where it is used: `123`, `on` and `null` are names. */}}

{{/* 38 characters leave room for what is put behind (a CronJob's name may have 52). What is cut off is told by a hash, for
     releases that begin alike must not share a claim. */}}
{{- define "migrator.short" -}}
{{- if gt (len .) 38 -}}
{{- printf "%s-%s" (trunc 29 . | regexFind "^.*[a-z0-9]") (sha256sum . | trunc 8) -}}
{{- else -}}
{{- . -}}
{{- end -}}
{{- end -}}

{{- define "migrator.name" -}}
{{- include "migrator.short" (default .Chart.Name .Values.nameOverride) -}}
{{- end -}}

{{- define "migrator.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- include "migrator.short" .Values.fullnameOverride -}}
{{- else if contains (include "migrator.name" .) .Release.Name -}}
{{- include "migrator.short" .Release.Name -}}
{{- else -}}
{{- include "migrator.short" (printf "%s-%s" .Release.Name (include "migrator.name" .)) -}}
{{- end -}}
{{- end -}}

{{- define "migrator.selectorLabels" -}}
app.kubernetes.io/name: {{ include "migrator.name" . | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end -}}

{{- define "migrator.labels" -}}
{{ include "migrator.selectorLabels" . }}
app.kubernetes.io/managed-by: {{ .Release.Service | quote }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" | quote }}
{{- /* A label's value begins and ends with a letter or a digit; a tag may have others there. */}}
{{- with .Values.image.tag | trunc 63 | regexFind "[A-Za-z0-9](.*[A-Za-z0-9])?" }}
app.kubernetes.io/version: {{ . | quote }}
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
