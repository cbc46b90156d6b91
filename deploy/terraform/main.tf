# What earmark needs in a project, with no more rights than it uses: APIs, a registry for the image,
# a bucket for the output, one service account for the workers and one for the build.

terraform {
  required_version = ">= 1.5"
  required_providers {
    google = {
      source  = "hashicorp/google"
      version = ">= 6.0"
    }
  }
}

provider "google" {
  project = var.project
  region  = var.region
}

resource "google_project_service" "apis" {
  for_each = toset([
    "artifactregistry.googleapis.com",
    "bigquery.googleapis.com",
    "cloudbuild.googleapis.com",
    "compute.googleapis.com",
    "dataflow.googleapis.com",
    "iam.googleapis.com",
    "logging.googleapis.com",
    "monitoring.googleapis.com",
    "storage.googleapis.com",
  ])
  service            = each.value
  disable_on_destroy = false
}

# The image. The launcher looks for REGION-docker.pkg.dev/PROJECT/earmark/earmark:VERSION.
resource "google_artifact_registry_repository" "earmark" {
  location      = var.region
  repository_id = "earmark"
  format        = "DOCKER"
  description   = "The earmark image: launcher and worker"
  depends_on    = [google_project_service.apis]
}

# The output, and beside it what a job stages. No lifecycle rule: one that removes objects by their age
# would remove the staged files of a running job.
resource "google_storage_bucket" "output" {
  count                       = var.create_output_bucket ? 1 : 0
  name                        = var.output_bucket
  location                    = var.region
  uniform_bucket_level_access = true
  public_access_prevention    = "enforced"
  depends_on                  = [google_project_service.apis]

  # Nothing here is overwritten or removed in a normal run, so soft deletion would only cost.
  soft_delete_policy {
    retention_duration_seconds = 0
  }
}

locals {
  output_bucket = var.create_output_bucket ? google_storage_bucket.output[0].name : var.output_bucket
}

# The workers.

resource "google_service_account" "worker" {
  account_id   = "earmark-worker"
  display_name = "Earmark's Dataflow workers"
  depends_on   = [google_project_service.apis]
}

resource "google_project_iam_member" "worker_dataflow" {
  project = var.project
  role    = "roles/dataflow.worker"
  member  = google_service_account.worker.member
}

resource "google_storage_bucket_iam_member" "worker_reads_input" {
  for_each = toset(var.input_buckets)
  bucket   = each.value
  role     = "roles/storage.objectViewer"
  member   = google_service_account.worker.member
}

resource "google_storage_bucket_iam_member" "worker_writes_output" {
  bucket = local.output_bucket
  role   = "roles/storage.objectUser"
  member = google_service_account.worker.member
}

# Staging asks for the bucket itself, not only for objects in it (from a template, the worker stages).
resource "google_storage_bucket_iam_member" "worker_sees_output_bucket" {
  bucket = local.output_bucket
  role   = "roles/storage.legacyBucketReader"
  member = google_service_account.worker.member
}

resource "google_artifact_registry_repository_iam_member" "worker_pulls_image" {
  location   = google_artifact_registry_repository.earmark.location
  repository = google_artifact_registry_repository.earmark.name
  role       = "roles/artifactregistry.reader"
  member     = google_service_account.worker.member
}

# Requester-pays inputs are billed to this project, which the reader must be allowed to use.
resource "google_project_iam_member" "worker_pays" {
  count   = var.requester_pays ? 1 : 0
  project = var.project
  role    = "roles/serviceusage.serviceUsageConsumer"
  member  = google_service_account.worker.member
}

# The build.

resource "google_service_account" "builder" {
  account_id   = "earmark-builder"
  display_name = "Builds the earmark image"
  depends_on   = [google_project_service.apis]
}

resource "google_project_iam_member" "builder_logs" {
  project = var.project
  role    = "roles/logging.logWriter"
  member  = google_service_account.builder.member
}

resource "google_storage_bucket_iam_member" "builder_reads_source" {
  bucket = local.output_bucket
  role   = "roles/storage.objectViewer"
  member = google_service_account.builder.member
}

resource "google_artifact_registry_repository_iam_member" "builder_pushes_image" {
  location   = google_artifact_registry_repository.earmark.location
  repository = google_artifact_registry_repository.earmark.name
  role       = "roles/artifactregistry.writer"
  member     = google_service_account.builder.member
}

# The people, or the service accounts of a scheduler, who launch.

locals {
  launcher_project_roles = toset([
    "roles/cloudbuild.builds.editor",
    "roles/dataflow.developer",
    "roles/logging.viewer",
    "roles/monitoring.viewer",
    "roles/serviceusage.serviceUsageConsumer",
  ])
  launcher_project_grants = {
    for pair in setproduct(var.launchers, local.launcher_project_roles) :
    "${pair[0]} ${pair[1]}" => { member = pair[0], role = pair[1] }
  }
  launcher_input_grants = {
    for pair in setproduct(var.launchers, var.input_buckets) :
    "${pair[0]} ${pair[1]}" => { member = pair[0], bucket = pair[1] }
  }
}

resource "google_project_iam_member" "launcher" {
  for_each = local.launcher_project_grants
  project  = var.project
  role     = each.value.role
  member   = each.value.member
}

resource "google_service_account_iam_member" "launcher_acts_as_worker" {
  for_each           = toset(var.launchers)
  service_account_id = google_service_account.worker.name
  role               = "roles/iam.serviceAccountUser"
  member             = each.value
}

resource "google_service_account_iam_member" "launcher_acts_as_builder" {
  for_each           = toset(var.launchers)
  service_account_id = google_service_account.builder.name
  role               = "roles/iam.serviceAccountUser"
  member             = each.value
}

resource "google_storage_bucket_iam_member" "launcher_reads_input" {
  for_each = local.launcher_input_grants
  bucket   = each.value.bucket
  role     = "roles/storage.objectViewer"
  member   = each.value.member
}

resource "google_storage_bucket_iam_member" "launcher_writes_output" {
  for_each = toset(var.launchers)
  bucket   = local.output_bucket
  role     = "roles/storage.objectUser"
  member   = each.value
}

resource "google_storage_bucket_iam_member" "launcher_sees_output_bucket" {
  for_each = toset(var.launchers)
  bucket   = local.output_bucket
  role     = "roles/storage.legacyBucketReader"
  member   = each.value
}

resource "google_artifact_registry_repository_iam_member" "launcher_reads_image" {
  for_each   = toset(var.launchers)
  location   = google_artifact_registry_repository.earmark.location
  repository = google_artifact_registry_repository.earmark.name
  role       = "roles/artifactregistry.reader"
  member     = each.value
}

# A template is launched on a VM that runs as the worker's account: it creates the job itself.

resource "google_project_iam_member" "worker_launches_template" {
  count   = var.flex_template ? 1 : 0
  project = var.project
  role    = "roles/dataflow.developer"
  member  = google_service_account.worker.member
}

resource "google_service_account_iam_member" "worker_acts_as_itself" {
  count              = var.flex_template ? 1 : 0
  service_account_id = google_service_account.worker.name
  role               = "roles/iam.serviceAccountUser"
  member             = google_service_account.worker.member
}

# Customer-managed keys: Cloud Storage itself encrypts, with the key that --kms-key names.

data "google_storage_project_service_account" "storage" {
  count = var.kms_key == "" ? 0 : 1
}

resource "google_kms_crypto_key_iam_member" "storage_encrypts" {
  count         = var.kms_key == "" ? 0 : 1
  crypto_key_id = var.kms_key
  role          = "roles/cloudkms.cryptoKeyEncrypterDecrypter"
  member        = data.google_storage_project_service_account.storage[0].member
}

# What watches. The files are what Cloud Monitoring itself takes, so they can be used without Terraform.

resource "google_monitoring_dashboard" "earmark" {
  dashboard_json = file("${path.module}/../monitoring/dashboard.json")
  depends_on     = [google_project_service.apis]
}

locals {
  alerts = {
    for name in fileset("${path.module}/../monitoring", "alert-*.json") :
    name => jsondecode(file("${path.module}/../monitoring/${name}"))
  }
}

resource "google_monitoring_alert_policy" "earmark" {
  for_each              = local.alerts
  display_name          = each.value.displayName
  combiner              = each.value.combiner
  notification_channels = var.notification_channels
  depends_on            = [google_project_service.apis]

  documentation {
    content   = each.value.documentation.content
    mime_type = each.value.documentation.mimeType
  }

  dynamic "conditions" {
    for_each = each.value.conditions
    content {
      display_name = conditions.value.displayName
      condition_prometheus_query_language {
        query               = conditions.value.conditionPrometheusQueryLanguage.query
        duration            = conditions.value.conditionPrometheusQueryLanguage.duration
        evaluation_interval = conditions.value.conditionPrometheusQueryLanguage.evaluationInterval
      }
    }
  }
}
