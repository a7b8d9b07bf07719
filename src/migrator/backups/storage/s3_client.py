"""A client for a bucket, and the meaning of its errors; only this module imports boto3.

Every bucket error is raised as :class:`S3Failure`, an OSError, because a store raises those. Newer SDKs
send and expect their own checksums (CRC32, in trailers), which many S3-compatible servers refuse or do
not know. They are used only if an operation requires one, because a backup is read back and hashed
anyway. https://docs.aws.amazon.com/sdkref/latest/guide/feature-dataintegrity.html
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from migrator.backups import clients
from migrator.errors import SettingsError
from migrator.runtime.logs import redact

CONNECT_TIMEOUT = 10.0
READ_TIMEOUT = 60.0
ATTEMPTS = 5
"""How often a request is made that fails for a passing reason (503, SlowDown, a lost connection, no answer).
"""
_QUICK_TIMEOUT, _QUICK_ATTEMPTS = 5.0, 2
_DEFAULT_REGION = "us-east-1"
_REMEDY = "use {}, the full image, or pip install 'migrator[s3]'"

_NO_ROOM = frozenset({"XMinioStorageFull", "InsufficientStorage", "QuotaExceeded", "InsufficientCapacity"})
_EXPIRED = frozenset({"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "InvalidToken"})
_WRONG_KEY = frozenset({"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidSecurity", "NotSignedUp"})
_DENIED = frozenset({"AccessDenied", "AllAccessDisabled", "AccountProblem", "403", "Forbidden"})
_REGION = frozenset(
    {
        "PermanentRedirect",
        "AuthorizationHeaderMalformed",
        "IllegalLocationConstraintException",
        "TemporaryRedirect",
        "301",
        "307",
    }
)
_MISSING = frozenset({"NoSuchKey", "404", "NotFound", "NoSuchVersion"})
_UNKNOWN = frozenset({"NotImplemented", "MethodNotAllowed", "501"})
_CLOCK = frozenset({"RequestTimeTooSkewed", "RequestExpired"})


class S3Failure(OSError):
    """A bucket request failed; ``why`` is one sentence, ``next_step`` is the fix.

    ``filename`` is the store's name, which distinguishes errors of the store; ``code`` is S3's own.
    """

    def __init__(self, place: str, why: str, next_step: str, code: str = "") -> None:
        super().__init__(None, why, place)
        self.why = why
        self.next_step = next_step
        self.code = code

    def __str__(self) -> str:
        return f"{self.filename}: {self.why}"

    @property
    def missing(self) -> bool:
        """Tell whether the object does not exist (any more)."""
        return self.code in _MISSING


@dataclass(frozen=True)
class Access:
    """The access to a bucket; without keys: the platform's identity (boto3's chain)."""

    endpoint: str = ""
    region: str = ""
    path_style: str = "auto"
    key_id: str = ""
    secret_key: str = ""
    token: str = ""

    def __repr__(self) -> str:
        return f"Access({self.endpoint or 'AWS'}, {self.region})"


def client(access: Access, *, quick: bool = False) -> Any:
    """Return boto3's client; a ``quick`` one gives up soon, for cleaning up after a failure.

    Raises :class:`SettingsError` if boto3 is missing.
    """
    with _library():
        import boto3
        from botocore.config import Config
    for name in ("boto3", "botocore", "s3transfer", "urllib3"):
        logging.getLogger(name).setLevel(
            logging.ERROR
        )  # at DEBUG they log headers, at INFO how keys were found
    session = boto3.session.Session()
    region = access.region or os.environ.get("AWS_REGION") or session.region_name
    style = {"on": "path", "off": "virtual"}.get(access.path_style, "path" if access.endpoint else "auto")
    config = Config(
        signature_version="s3v4",
        connect_timeout=_QUICK_TIMEOUT if quick else CONNECT_TIMEOUT,
        read_timeout=_QUICK_TIMEOUT if quick else READ_TIMEOUT,
        retries={"mode": "standard", "total_max_attempts": _QUICK_ATTEMPTS if quick else ATTEMPTS},
        s3={"addressing_style": style},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        user_agent_extra="migrator",
    )
    keys = {}
    if access.key_id and access.secret_key:
        keys = {"aws_access_key_id": access.key_id, "aws_secret_access_key": access.secret_key}
        keys |= {"aws_session_token": access.token} if access.token else {}
    made = session.client(
        "s3",
        region_name=region or _DEFAULT_REGION,
        endpoint_url=access.endpoint or None,
        config=config,
        **keys,
    )
    made.meta.events.register("before-sign.s3", _remember_secrets)
    return made


def _remember_secrets(request_signer: Any = None, **_: Any) -> None:
    """Mask the platform's keys in the log: they change during a run."""
    credentials = getattr(request_signer, "_credentials", None)
    if credentials is not None:
        frozen = credentials.get_frozen_credentials()
        secrets = {frozen.secret_key, frozen.token} - {None, ""}
        if not secrets <= _remembered:
            _remembered.update(secrets)
            redact.add(secrets)


_remembered: set[str] = set()


@contextlib.contextmanager
def _library() -> Iterator[None]:
    """Return how to install boto3 after a failed import."""
    try:
        yield
    except ImportError as error:
        problem = "MIGRATOR_BACKUP_URL: a bucket needs boto3, which is not installed"
        raise SettingsError([problem], next_step=_REMEDY.format(clients.full_image())) from error


@contextlib.contextmanager
def translated(place: str, bucket: str, access: Access, what: str) -> Iterator[None]:
    """Raise boto3's errors as :class:`S3Failure`; ``what`` names the privilege that the request needs."""
    with _library():
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except ClientError as error:
        raise _refused(place, bucket, access, what, error.response) from error
    except (BotoCoreError, Boto3Error, ValueError) as error:  # ValueError: an address that cannot be one
        raise _unreached(place, access, error) from error


def _refused(place: str, bucket: str, access: Access, what: str, response: Mapping[str, Any]) -> S3Failure:
    """Return the meaning of an error that the server answered with."""
    error = response.get("Error", {})
    code, said = str(error.get("Code", "")), redact(" ".join(str(error.get("Message", "")).split()))[:300]
    meta = response.get("ResponseMetadata", {})
    region = error.get("Region") or meta.get("HTTPHeaders", {}).get("x-amz-bucket-region", "")
    status = int(meta.get("HTTPStatusCode") or 0)
    quoted = f"{code}: {said}" if said and said != code else code
    why, next_step = f"the server answered {quoted}", "fix the cause and run again"
    if code == "NoSuchBucket":
        why = f"there is no bucket {bucket}"
        next_step = "create it, or correct MIGRATOR_BACKUP_URL or MIGRATOR_S3_ENDPOINT"
    elif code in _EXPIRED:
        why = f"the temporary key has expired ({quoted})"
        next_step = "set a new AWS_SESSION_TOKEN with its key, or use the platform's identity, and run again"
    elif code in _WRONG_KEY:
        why = f"the server does not accept the key ({quoted})"
        next_step = "fix AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or their _FILE)"
    elif code in _CLOCK:
        why, next_step = f"the clocks differ ({quoted})", "correct this machine's clock"
    elif code in _REGION or (region and region != access.region and status in (301, 307, 400)):
        is_in = (
            f"the bucket {bucket} is in region {region}" if region else f"the bucket {bucket} is elsewhere"
        )
        why = f"{is_in}, not in {access.region or _DEFAULT_REGION} ({quoted})"
        next_step = (
            f"set MIGRATOR_S3_REGION={region}" if region else "set MIGRATOR_S3_REGION to the bucket's region"
        )
    elif code in _DENIED or status == 403:
        why = f"access is denied ({quoted})"
        next_step = f"grant the key {what} on {place}, or name another place in MIGRATOR_BACKUP_URL"
    elif code in _NO_ROOM or status == 507:
        why, next_step = f"the server is full ({quoted})", "free space there, and run again"
    elif code in _UNKNOWN or status == 501:
        why = f"the server does not support a request ({quoted})"
        next_step = "use a server with S3 multipart uploads, or a folder in MIGRATOR_BACKUP_URL"
    elif status >= 500 or code in ("SlowDown", "RequestTimeout", "InternalError"):
        why = f"the server kept answering {quoted} ({ATTEMPTS} times)"
        next_step = "run again when the server has recovered"
    return S3Failure(place, why, next_step, code)


def _unreached(place: str, access: Access, error: Exception) -> S3Failure:
    """Return the meaning of a missing answer."""
    kind = type(error).__name__
    said = redact(" ".join(str(error).split()))[:300]
    where = access.endpoint or "AWS"
    if kind in (
        "NoCredentialsError",
        "PartialCredentialsError",
        "CredentialRetrievalError",
        "TokenRetrievalError",
    ):
        return S3Failure(
            place,
            f"there is no access key ({said})",
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or their _FILE), or give the container the "
            "platform's identity",
            kind,
        )
    if kind in ("ParamValidationError", "ProfileNotFound", "ConfigParseError", "ValueError"):
        return S3Failure(
            place,
            f"it cannot be used ({said})",
            "fix MIGRATOR_BACKUP_URL, MIGRATOR_S3_ENDPOINT or the AWS_ variables",
            kind,
        )
    return S3Failure(
        place,
        f"{where} cannot be reached, or the connection broke ({kind}: {said})",
        "fix MIGRATOR_S3_ENDPOINT and the network policy, or run again when the server has recovered",
        kind,
    )
