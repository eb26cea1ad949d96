{{/* What a schema cannot say: what fits together. One line each: the cause, the value by name, the way out. */}}
{{- define "dpfa.validate" -}}
{{- $v := .Values -}}
{{- $sqlite := include "dpfa.sqlite" . -}}
{{- $several := gt (len $v.regions) 1 -}}
{{- if include "dpfa.needsLedger" . -}}
  {{- if and $sqlite $several -}}
    {{- fail "ledger.backend=sqlite with several regions: every region would have a ledger, and a budget, of its own; use postgresql" -}}
  {{- end -}}
  {{- if and $sqlite (or $v.multiKueue.hub $v.multiKueue.dispatched) -}}
    {{- fail "ledger.backend=sqlite with multiKueue: jobs in several clusters need one ledger; use postgresql" -}}
  {{- end -}}
  {{- if and $sqlite $v.training.enabled (gt (int $v.training.nodes) 1) -}}
    {{- fail "ledger.backend=sqlite with training.nodes above 1: the file must stay on one node; use postgresql, or training.nodes=1 with more training.processesPerNode" -}}
  {{- end -}}
  {{- if and $sqlite (not $v.ledger.sqlite.node) -}}
    {{- fail "ledger.sqlite.node is empty: give the kubernetes.io/hostname of the one node whose pods may open the file" -}}
  {{- end -}}
  {{- if and (not $sqlite) (not $v.ledger.postgresql.existingSecret) -}}
    {{- fail "ledger.postgresql.existingSecret is empty: name the Secret that holds the ledger's URL" -}}
  {{- end -}}
  {{- if and $v.ledger.witness.existingClaim $v.ledger.witness.existingSecret -}}
    {{- fail "ledger.witness has existingClaim and existingSecret: a ledger has one witness; leave one of them empty" -}}
  {{- end -}}
  {{- if and $v.ledger.witness.existingClaim (not $sqlite) -}}
    {{- fail "ledger.witness.existingClaim with postgresql: pods on several nodes would open one SQLite file; use ledger.witness.existingSecret" -}}
  {{- end -}}
  {{- if and $v.ledger.witness.existingClaim (eq $v.ledger.witness.existingClaim (include "dpfa.ledgerClaim" .)) -}}
    {{- fail "ledger.witness.existingClaim is the ledger's own claim: whoever puts back an old ledger would put back its witness; use another disk" -}}
  {{- end -}}
{{- end -}}
{{- if and $several (not $v.multiKueue.hub) (not (has $v.region $v.regions)) -}}
  {{- fail (printf "region %q is not one of regions: say which of them this cluster is" $v.region) -}}
{{- end -}}
{{- if $v.training.enabled -}}
  {{- if and $v.training.submit (not $v.training.privacy.dataset) -}}
    {{- fail "training.privacy.dataset is empty: name the data set, so that the ledger adds up all runs on it" -}}
  {{- end -}}
  {{- if and $v.training.submit (not $v.training.privacy.targetEpsilon) -}}
    {{- fail "training.privacy.targetEpsilon is not set: `dpfa plan` shows what each costs" -}}
  {{- end -}}
  {{- if and $v.training.submit (not $v.training.privacy.expectedBatchSize) -}}
    {{- fail "training.privacy.expectedBatchSize is not set: it is part of the plan, and must not follow the number of processes" -}}
  {{- end -}}
  {{- if not $v.training.data.existingClaim -}}
    {{- fail "training.data.existingClaim is empty: name the claim with the base model and the private records" -}}
  {{- end -}}
  {{- if ne (not $v.training.privacy.datasetBudgetEpsilon) (not $v.training.privacy.datasetBudgetDelta) -}}
    {{- fail "training.privacy.datasetBudgetEpsilon and datasetBudgetDelta go together: a budget is one (epsilon, delta)" -}}
  {{- end -}}
  {{- if and $v.training.privacy.datasetBudgetEpsilon $v.training.privacy.targetEpsilon -}}
    {{- if gt (float64 $v.training.privacy.targetEpsilon) (float64 $v.training.privacy.datasetBudgetEpsilon) -}}
      {{- fail "training.privacy.targetEpsilon is above datasetBudgetEpsilon: the ledger would refuse the run; lower the target" -}}
    {{- end -}}
  {{- end -}}
  {{- if and (eq $v.training.kind "Job") (gt (int $v.training.nodes) 1) -}}
    {{- fail "training.kind=Job with training.nodes above 1: a Job is not started as a gang; use TrainJob" -}}
  {{- end -}}
  {{- if and (gt (int $v.training.nodes) 1) (not $v.checkpoints.existingClaim) (ne $v.checkpoints.accessMode "ReadWriteMany") -}}
    {{- fail "training.nodes above 1 needs checkpoints that all nodes share: checkpoints.accessMode=ReadWriteMany" -}}
  {{- end -}}
  {{- if and (or $v.multiKueue.hub $v.multiKueue.dispatched) $v.training.submit (not $v.training.queue) -}}
    {{- fail "multiKueue without training.queue: Kueue sees only jobs of a queue" -}}
  {{- end -}}
  {{- if and (not $v.training.runtime.create) (not $v.training.runtime.name) -}}
    {{- fail "training.runtime.create=false without training.runtime.name: name the runtime that is there" -}}
  {{- end -}}
{{- end -}}
{{- if and $v.evidence.enabled (not $v.evidence.model) -}}
  {{- fail "evidence.model is empty: give the model's folder in the checkpoints' claim, such as run-1/model" -}}
{{- end -}}
{{- if and $v.evidence.enabled (not $v.evidence.signingKey.existingSecret) -}}
  {{- fail "evidence.signingKey.existingSecret is empty: unsigned evidence passes no gate" -}}
{{- end -}}
{{- if and $v.backup.enabled (not $v.backup.existingSecret) -}}
  {{- fail "backup.existingSecret is empty: name the Secret with RESTIC_REPOSITORY and RESTIC_PASSWORD" -}}
{{- end -}}
{{- if $v.serving.enabled -}}
  {{- if not $v.serving.model.path -}}
    {{- fail "serving.model.path is empty: give the model's folder in its claim, such as run-1/model" -}}
  {{- end -}}
  {{- if or (not $v.gate.maxEpsilon) (not $v.gate.maxDelta) -}}
    {{- fail "gate.maxEpsilon and gate.maxDelta must be set: no model is served without a limit" -}}
  {{- end -}}
  {{- if not $v.gate.publicKey.existingConfigMap -}}
    {{- fail "gate.publicKey.existingConfigMap is empty: without the key anybody's evidence would pass" -}}
  {{- end -}}
  {{- $least := ternary $v.serving.hpa.minReplicas $v.serving.replicas $v.serving.hpa.enabled -}}
  {{- if and $v.serving.pdb.enabled (ge (int $v.serving.pdb.minAvailable) (int $least)) -}}
    {{- fail (printf "serving.pdb.minAvailable must be below the %d replicas: no node could be drained" (int $least)) -}}
  {{- end -}}
  {{- if and $v.serving.hpa.enabled (gt (int $v.serving.hpa.minReplicas) (int $v.serving.hpa.maxReplicas)) -}}
    {{- fail "serving.hpa.minReplicas is above maxReplicas" -}}
  {{- end -}}
{{- end -}}
{{- if $v.istio.enabled -}}
  {{- if not $v.serving.enabled -}}
    {{- fail "istio.enabled without serving.enabled: there is nothing to route to" -}}
  {{- end -}}
  {{- if not $v.istio.hosts -}}
    {{- fail "istio.hosts is empty: name the hosts that clients ask for" -}}
  {{- end -}}
{{- end -}}
{{- if and $v.multiKueue.hub (not $v.multiKueue.clusters) -}}
  {{- fail "multiKueue.hub without multiKueue.clusters: name each worker cluster and the Secret with its kubeconfig" -}}
{{- end -}}
{{- end }}
