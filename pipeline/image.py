"""Asks a container registry what is in an image, before machines are started that would.

Docker's Registry HTTP API V2: https://distribution.github.io/distribution/spec/api/
"""

from __future__ import annotations

from typing import Any

import requests

from pipeline.options import UsageError

LABELS = {
    "earmark.python": "python",
    "earmark.beam": "beam",
    "earmark.version": "earmark",
    "earmark.checkpoint": "checkpoint",
}

_ACCEPT = ", ".join(
    (
        "application/vnd.oci.image.manifest.v1+json",
        "application/vnd.docker.distribution.manifest.v2+json",
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
    )
)
_TIMEOUT_S = 20.0
_REGISTRIES = (".pkg.dev", "gcr.io")  # those that take Google's credentials


class ImageUnknown(RuntimeError):
    """The registry could not be asked; the message says why."""


def image_versions(image: str) -> dict[str, str]:
    """What an image's labels say of its `python`, `beam`, `earmark` and `checkpoint`.

    Raises:
        UsageError: the registry has no such image.
        ImageUnknown: the registry does not answer, or not to these credentials.
    """
    host, _, rest = image.partition("/")
    if not rest or not (host.endswith(_REGISTRIES) or host.startswith("localhost:")):
        raise ImageUnknown(f"{image} is in no registry of Google's, and was not looked at")
    name, _, digest = rest.partition("@")
    name, _, tag = name.partition(":")
    scheme = "http" if host.startswith("localhost:") else "https"
    root = f"{scheme}://{host}/v2/{name}"
    with requests.Session() as session:
        session.headers["Accept"] = _ACCEPT
        if scheme == "https":
            session.headers["Authorization"] = f"Bearer {_token()}"
        manifest = _get(session, f"{root}/manifests/{digest or tag or 'latest'}", image)
        if "manifests" in manifest:  # an index of one image for each kind of machine
            fitting = [
                entry["digest"]
                for entry in manifest["manifests"]
                if entry.get("platform", {}).get("architecture") == "amd64"
            ]
            if not fitting:
                raise UsageError(f"the image {image} has no variant for amd64, which Dataflow runs")
            manifest = _get(session, f"{root}/manifests/{fitting[0]}", image)
        config = _get(session, f"{root}/blobs/{manifest['config']['digest']}", image)
    labels = config.get("config", {}).get("Labels") or {}
    return {what: labels[label] for label, what in LABELS.items() if label in labels}


def _get(session: requests.Session, url: str, image: str) -> dict[str, Any]:
    try:
        answer = session.get(url, timeout=_TIMEOUT_S)
    except requests.RequestException as error:
        raise ImageUnknown(
            f"the registry of {image} does not answer; is --region right?"
        ) from error
    if answer.status_code == 404:
        raise UsageError(
            f"there is no image {image}: build it first (deploy/README.md), or name another with "
            "--sdk_container_image"
        )
    if answer.status_code in (401, 403):
        raise ImageUnknown(
            f"these credentials may not read {image} (HTTP {answer.status_code}); the workers' service "
            "account must be able to (roles/artifactregistry.reader)"
        )
    if not answer.ok:
        raise ImageUnknown(f"the registry of {image} answers HTTP {answer.status_code}")
    content: dict[str, Any] = answer.json()
    return content


def _token() -> str:
    import google.auth
    from google.auth.exceptions import GoogleAuthError
    from google.auth.transport.requests import Request

    try:
        credentials, _ = google.auth.default(
            scopes=["https://www.googleapis.com/auth/cloud-platform"]
        )
        credentials.refresh(Request())
    except GoogleAuthError as error:
        raise ImageUnknown("there are no Google credentials to ask the registry with") from error
    return str(credentials.token)
