{{/*
The containers. For pods of your own chart, which depends on this one:

    initContainers:
      {{- include "migrator.initContainer" .Subcharts.migrator | nindent 8 }}
    volumes:
      {{- include "migrator.volumes" .Subcharts.migrator | nindent 8 }}

migrator.initContainer   applies what is pending, before the pod's containers start
migrator.sidecar         the same, then stays: /livez, /readyz, /metrics (a native sidecar)
migrator.waitForCurrent  waits until somebody else has migrated: for workers
migrator.volumes         the volumes that the first two mount
migrator.readerVolumes   the volumes that migrator.waitForCurrent mounts
*/}}

{{- define "migrator.initContainer" -}}
{{- include "migrator.check" . -}}
{{- include "migrator.checkPhases" (list . "migrator.initContainer") -}}
- name: migrator
  {{- include "migrator.container" (dict "root" . "args" .Values.initContainer.args) | nindent 2 }}
{{- end -}}

{{- define "migrator.sidecar" -}}
{{- include "migrator.check" . -}}
{{- include "migrator.checkPhases" (list . "migrator.sidecar") -}}
- name: migrator
  restartPolicy: Always
  {{- $listen := printf "%s:%d" .Values.sidecar.address (int .Values.sidecar.port) }}
  {{- $env := list (dict "name" "MIGRATOR_SIDECAR_LISTEN" "value" $listen) }}
  {{- include "migrator.container" (dict "root" . "args" (list "sidecar") "env" $env) | nindent 2 }}
  ports:
    - name: migrator
      containerPort: {{ int .Values.sidecar.port }}
  startupProbe:
    httpGet:
      path: /readyz
      port: migrator
    periodSeconds: 2
    timeoutSeconds: 5
    failureThreshold: {{ max 1 (div (int .Values.sidecar.startupSeconds) 2) }}
  livenessProbe:
    httpGet:
      path: /livez
      port: migrator
    periodSeconds: 10
    timeoutSeconds: 5
    failureThreshold: 6
{{- end -}}

{{- define "migrator.waitForCurrent" -}}
{{- include "migrator.checkPhases" (list . "migrator.waitForCurrent") -}}
{{- $args := list "wait-for-current" "--wait-timeout" .Values.waitForCurrent.timeout -}}
- name: wait-for-schema
  {{- include "migrator.container" (dict "root" . "args" $args "reader" true "name" "migrator-reader" "secret" .Values.waitForCurrent.databaseSecret) | nindent 2 }}
{{- end -}}

{{/* A container without its name. args; env: more variables; name, secret, identity, reader: as in
     migrator.volumeList. */}}
{{- define "migrator.container" -}}
{{- $values := .root.Values -}}
image: {{ include "migrator.image" .root | quote }}
imagePullPolicy: {{ $values.image.pullPolicy }}
args: {{ toJson .args }}
env:
  {{- $env := include "migrator.env" . }}
  {{- include "migrator.once" (dict "items" (fromYamlArray $env) "key" "name" "what" "extraEnv") }}
  {{- $env | nindent 2 }}
resources: {{- toYaml $values.resources | nindent 2 }}
securityContext:
  {{- include "migrator.user" .root | nindent 2 }}
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
terminationMessagePolicy: FallbackToLogsOnError
volumeMounts:
  {{- $mounts := include "migrator.mounts" . }}
  {{- include "migrator.once" (dict "items" (fromYamlArray $mounts) "key" "mountPath" "what" "extraVolumeMounts") }}
  {{- $mounts | nindent 2 }}
{{- end -}}

{{/* Said in the container as well as in the pod, so that it is restricted in a pod of any chart. */}}
{{- define "migrator.user" -}}
runAsNonRoot: true
{{- with .Values.podSecurity.runAsUser }}
runAsUser: {{ int64 . }}
{{- end }}
{{- with .Values.podSecurity.runAsGroup }}
runAsGroup: {{ int64 . }}
{{- end }}
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{/* As in migrator.container. */}}
{{- define "migrator.env" -}}
{{- $values := .root.Values -}}
- name: MIGRATOR_DATABASE_URL_FILE
  value: /etc/migrator/database/url
{{- if and $values.database.directKey (not .secret) }}
- name: MIGRATOR_DIRECT_URL_FILE
  value: /etc/migrator/database/direct-url
{{- end }}
{{- if not .reader }}
{{- include "migrator.backupEnv" .root | nindent 0 }}
{{- end }}
{{- if .identity }}
- name: MIGRATOR_BACKUP_IDENTITY_FILE
  value: /etc/migrator/identity/identity
{{- end }}
{{- range $name, $value := $values.settings }}
- name: {{ $name }}
  value: {{ include "migrator.text" $value | quote }}
{{- end }}
{{- range .env }}
- {{ toYaml . | nindent 2 | trim }}
{{- end }}
{{- range $values.extraEnv }}
- {{ toYaml . | nindent 2 | trim }}
{{- end }}
{{- end -}}

{{/* As in migrator.container. */}}
{{- define "migrator.mounts" -}}
{{- $values := .root.Values -}}
- name: {{ default "migrator-database" .name }}
  mountPath: /etc/migrator/database
  readOnly: true
{{- if $values.database.certificatesSecret }}
- name: {{ if .reader }}migrator-reader-certificates{{ else }}migrator-certificates{{ end }}
  mountPath: /etc/migrator/certificates
  readOnly: true
{{- end }}
{{- if not .reader }}
- name: migrator-scratch
  mountPath: /tmp
{{- if eq $values.backups.to "claim" }}
- name: migrator-backups
  mountPath: /backups
{{- else if and (eq $values.backups.to "s3") $values.backups.s3.existingSecret }}
- name: migrator-bucket
  mountPath: /etc/migrator/bucket
  readOnly: true
{{- end }}
{{- end }}
{{- if .identity }}
- name: migrator-identity
  mountPath: /etc/migrator/identity
  readOnly: true
{{- end }}
{{- with $values.extraVolumeMounts }}
{{- toYaml . | nindent 0 }}
{{- end }}
{{- end -}}

{{- define "migrator.backupEnv" -}}
{{- $backups := .Values.backups -}}
{{- if eq $backups.to "none" -}}
- name: MIGRATOR_BACKUP
  value: "off"
{{- else if eq $backups.to "claim" -}}
- name: MIGRATOR_BACKUP_URL
  value: file:///backups
{{- else -}}
- name: MIGRATOR_BACKUP_URL
  value: {{ $backups.s3.url | quote }}
- name: MIGRATOR_S3_PATH_STYLE
  value: {{ $backups.s3.pathStyle | quote }}
{{- with $backups.s3.endpoint }}
- name: MIGRATOR_S3_ENDPOINT
  value: {{ . | quote }}
{{- end }}
{{- with $backups.s3.region }}
- name: MIGRATOR_S3_REGION
  value: {{ . | quote }}
{{- end }}
{{- if $backups.s3.existingSecret }}
- name: AWS_ACCESS_KEY_ID_FILE
  value: /etc/migrator/bucket/access-key-id
- name: AWS_SECRET_ACCESS_KEY_FILE
  value: /etc/migrator/bucket/secret-access-key
{{- end }}
{{- end -}}
{{- end -}}

{{/* Numbers of a values file are float64: 1000000 would be written as 1e+06. */}}
{{- define "migrator.text" -}}
{{- if kindIs "float64" . }}{{ int64 . }}{{ else }}{{ . }}{{ end -}}
{{- end -}}
