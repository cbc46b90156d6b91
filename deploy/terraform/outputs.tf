output "image" {
  value       = "${var.region}-docker.pkg.dev/${var.project}/${google_artifact_registry_repository.earmark.repository_id}/earmark"
  description = "The image's name, without its tag."
}

output "worker" {
  value       = google_service_account.worker.email
  description = "For --service_account_email."
}

output "bucket" {
  value       = "gs://${local.output_bucket}"
  description = "For deploy.sh's BUCKET."
}
