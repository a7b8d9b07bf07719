{{/* A Job's spec, without its braces. args; component; secret, identity, reader: as in migrator.volumeList. */}}

{{- define "migrator.jobSpec" -}}
{{- $values := .root.Values -}}
backoffLimit: {{ int $values.backoffLimit }}
{{- with $values.activeDeadlineSeconds }}
activeDeadlineSeconds: {{ int64 . }}
{{- end }}
ttlSecondsAfterFinished: {{ int64 $values.ttlSecondsAfterFinished }}
podReplacementPolicy: Failed
podFailurePolicy:
  rules:
    # A pod that was evicted or preempted has failed for no reason of its own: it is not counted.
    - action: Ignore
      onPodConditions:
        - type: DisruptionTarget
          status: "True"
    # Exit codes that no retry helps against: 10, the 30s, the 40s, 70. All others count towards backoffLimit.
    - action: FailJob
      onExitCodes:
        containerName: migrator
        operator: In
        values: [10, {{ untilStep 30 50 1 | join ", " }}, 70]
template:
  metadata:
    labels:
      {{- include "migrator.selectorLabels" .root | nindent 6 }}
      app.kubernetes.io/component: {{ .component }}
      {{- with $values.podLabels }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
    {{- with $values.podAnnotations }}
    annotations:
      {{- toYaml . | nindent 6 }}
    {{- end }}
  spec:
    restartPolicy: Never
    {{- include "migrator.podSpec" .root | nindent 4 }}
    containers:
      - name: migrator
        {{- include "migrator.container" . | nindent 8 }}
    volumes:
      {{- include "migrator.volumeList" . | nindent 6 }}
{{- end -}}

{{- define "migrator.podSpec" -}}
serviceAccountName: {{ include "migrator.serviceAccountName" . }}
automountServiceAccountToken: false
enableServiceLinks: false
terminationGracePeriodSeconds: {{ int64 .Values.terminationGracePeriodSeconds }}
securityContext:
  {{- include "migrator.user" . | nindent 2 }}
  {{- with .Values.podSecurity.fsGroup }}
  fsGroup: {{ int64 . }}
  fsGroupChangePolicy: OnRootMismatch
  {{- end }}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- end -}}
