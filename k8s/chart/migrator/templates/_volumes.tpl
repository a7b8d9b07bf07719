{{/* The volumes that the containers of _container.tpl mount. */}}

{{- define "migrator.volumes" -}}
{{- include "migrator.volumeList" (dict "root" .) -}}
{{- end -}}

{{- define "migrator.readerVolumes" -}}
{{- $secret := .Values.waitForCurrent.databaseSecret -}}
{{- include "migrator.volumeList" (dict "root" . "name" "migrator-reader" "secret" $secret "reader" true) -}}
{{- end -}}

{{/* name: of the address's volume; secret: another than database.existingSecret; reader: no backups; identity. */}}
{{- define "migrator.volumeList" -}}
{{- $volumes := include "migrator.volumeItems" . -}}
{{- include "migrator.once" (dict "items" (fromYamlArray $volumes) "key" "name" "what" "extraVolumes") -}}
{{- $volumes -}}
{{- end -}}

{{- define "migrator.volumeItems" -}}
{{- $values := .root.Values -}}
- name: {{ default "migrator-database" .name }}
  secret:
    secretName: {{ default $values.database.existingSecret .secret | quote }}
    items:
      - key: {{ $values.database.key | quote }}
        path: url
      {{- if and $values.database.directKey (not .secret) }}
      - key: {{ $values.database.directKey | quote }}
        path: direct-url
      {{- end }}
{{- with $values.database.certificatesSecret }}
- name: {{ if $.reader }}migrator-reader-certificates{{ else }}migrator-certificates{{ end }}
  secret:
    secretName: {{ . | quote }}
{{- end }}
{{- if not .reader }}
- name: migrator-scratch
  emptyDir:
    sizeLimit: {{ $values.scratch.sizeLimit | quote }}
{{- if eq $values.backups.to "claim" }}
- name: migrator-backups
  persistentVolumeClaim:
    claimName: {{ include "migrator.claimName" .root | quote }}
{{- else if and (eq $values.backups.to "s3") $values.backups.s3.existingSecret }}
- name: migrator-bucket
  secret:
    secretName: {{ $values.backups.s3.existingSecret | quote }}
{{- end }}
{{- end }}
{{- with .identity }}
- name: migrator-identity
  secret:
    secretName: {{ . | quote }}
{{- end }}
{{- with $values.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}
