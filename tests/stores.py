"""Object stores on this machine, which answer as Amazon's and Google's do."""

import contextlib
import http
import logging
import os
import socket
from collections.abc import Iterator
from unittest import mock

import fsspec
from etils.epath.backend import fsspec_backend

BUCKET = "runs"


def forget_stores() -> None:
    """Drops the connections that fsspec and epath keep, which know the store of before."""
    fsspec_backend._get_filesystem.cache_clear()
    for protocol in ("s3", "gcs"):
        fsspec.get_filesystem_class(protocol).clear_instance_cache()


@contextlib.contextmanager
def s3_store() -> Iterator[str]:
    """Serves S3 with an empty bucket; yields `s3://BUCKET`. Its address is in the environment."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it has a line for every request
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    variables = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "tests",
        "AWS_SECRET_ACCESS_KEY": "tests",
        "AWS_DEFAULT_REGION": "us-east-1",
        # Tensorstore looks for these files in vain, at length.
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    with mock.patch.dict(os.environ, variables):
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        forget_stores()
        try:
            yield f"s3://{BUCKET}"
        finally:
            forget_stores()
            server.stop()


def _download_telling_generations():
    """Returns the emulator's function that reads an object, made to tell its generation.

    As Google's server does, and tensorstore needs whenever it writes to a checkpoint twice. The
    emulator leaves it out, which fails as soon as a save is slow enough to be written in two parts.
    """
    from gcp_storage_emulator.handlers.objects import download

    def telling(request, response, storage, *rest):
        download(request, response, storage, *rest)
        if response.status < http.HTTPStatus.BAD_REQUEST:
            name = request.params["bucket_name"], request.params["object_id"]
            response["x-goog-generation"] = storage.get_file_obj(*name)["generation"]

    return telling


@contextlib.contextmanager
def gs_store() -> Iterator[str]:
    """Serves Google Cloud Storage likewise; yields `gs://BUCKET`."""
    from gcp_storage_emulator.handlers import objects
    from gcp_storage_emulator.server import create_server

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    variables = {
        "STORAGE_EMULATOR_HOST": address,
        "TENSORSTORE_GCS_HTTP_URL": address,
        "GOOGLE_CLOUD_PROJECT": "tests",
    }
    reading = mock.patch.object(objects, "download", _download_telling_generations())
    with mock.patch.dict(os.environ, variables), reading:
        server = create_server("127.0.0.1", port, in_memory=True, default_bucket=BUCKET)
        server.start()
        forget_stores()
        try:
            yield f"gs://{BUCKET}"
        finally:
            forget_stores()
            server.stop()
