"""What an error of obstore means, in one line that holds no header, key or body of the exchange."""

from __future__ import annotations

import re

_MEANINGS = {
    "NoSuchBucket": "there is no such bucket; create it, or check AWS_ENDPOINT_URL",
    "InvalidAccessKeyId": "the store does not know the access key; check AWS_ACCESS_KEY_ID and AWS_ENDPOINT_URL",
    "SignatureDoesNotMatch": "the store does not accept the secret key; check AWS_SECRET_ACCESS_KEY",
    "ExpiredToken": "the credentials have expired; renew them",
    "AccessDenied": "the store denies access; check what these credentials may do with this bucket",
    "PermanentRedirect": "the bucket is in another region; set AWS_REGION",
    "AuthorizationHeaderMalformed": "the bucket is in another region; set AWS_REGION",
}
_CREDENTIALS = (
    "no credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY "
    "(gs: GOOGLE_APPLICATION_CREDENTIALS) in the environment"
)
_METADATA_SERVICES = ("169.254.169.254", "metadata.google.internal", "169.254.170.2")


def is_lost(error: Exception) -> bool:
    """Say whether the connection is at fault: the same request may get through next time."""
    return "HTTP error:" in str(error) and "builder error" not in str(error)


def was_not_repeated(error: Exception) -> bool:
    """Say whether the connection is at fault, and obstore did not try again: half an answer, an unsafe request."""
    return is_lost(error) and not re.search(r"after \d+ retries", str(error))


def reason_of(error: Exception) -> str:
    """Say in a line what went wrong, from the code of the answer; its text is not repeated, for it may hold keys."""
    text = str(error)
    if "Missing AccessKeyId" in text or "Missing SecretAccessKey" in text or any(s in text for s in _METADATA_SERVICES):
        return _CREDENTIALS
    if code := re.search(r"<Code>(\w+)</Code>", text):
        return _MEANINGS.get(code[1], f"the store answered {code[1]}")
    endpoint = re.search(r"(https?://)(?:[^/@\s]*@)?([^/?\s]+)", text)
    where = f" at {endpoint[1]}{endpoint[2]}" if endpoint else ""
    if "builder error" in text:
        return f"the endpoint{where} is not https; set AWS_ALLOW_HTTP=true if that is wanted"
    if is_lost(error):
        return f"no connection to the store{where}, or it broke off every time; check AWS_ENDPOINT_URL and the network"
    if status := re.search(r"status code: (\d{3} [A-Za-z ]+)", text):
        return f"the store{where} answered {status[1].strip()}"
    return f"the store{where} failed ({type(error).__name__})"
