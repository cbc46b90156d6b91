variable "project" {
  type        = string
  description = "The Google Cloud project; it exists and has billing."
}

variable "region" {
  type        = string
  description = "Where data, image and workers are: one that has the GPU you want."
}

variable "input_buckets" {
  type        = list(string)
  description = "Names (no gs://) of the buckets that hold audio; they are read, never written."
}

variable "output_bucket" {
  type        = string
  description = "Name (no gs://) of the bucket for tags and staged files."
}

variable "create_output_bucket" {
  type        = bool
  default     = true
  description = "Whether the output bucket is made here."
}

variable "launchers" {
  type        = list(string)
  default     = []
  description = "Who may launch: user:ada@example.com, serviceAccount:..., group:..."
}

variable "flex_template" {
  type        = bool
  default     = false
  description = "Whether jobs are launched from the Flex Template too."
}

variable "requester_pays" {
  type        = bool
  default     = false
  description = "Whether input buckets bill their readers (--billing-project)."
}

variable "kms_key" {
  type        = string
  default     = ""
  description = "projects/.../cryptoKeys/... for --kms-key, or empty."
}

variable "notification_channels" {
  type        = list(string)
  default     = []
  description = "Names (projects/.../notificationChannels/...) of who hears of alerts."
}
