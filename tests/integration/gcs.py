"""Google Cloud Storage on loopback: gcp-storage-emulator, and the conditions on generations that TensorStore relies on.

The emulator sends no generation with an object's content and ignores `ifGenerationMatch` and `ifGenerationNotMatch`:
TensorStore then overwrites what another writer wrote, or stops ("Malformed StorageGeneration"). Both are added here.
"""

import contextlib
from http import HTTPStatus

from gcp_storage_emulator import server
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects

EMULATORS = objects.download, objects.insert


def _generation(storage, bucket, name):
    """An object's generation, "0" where there is none."""
    with contextlib.suppress(NotFound):
        return str(storage.get_file_obj(bucket, name)["generation"])
    return "0"


def download(request, response, storage, *args, **kwargs):
    found = _generation(storage, request.params["bucket_name"], request.params["object_id"])
    if request.query.get("ifGenerationNotMatch", [""])[0] == found:
        response.status = HTTPStatus.NOT_MODIFIED
        return
    EMULATORS[0](request, response, storage, *args, **kwargs)
    if response.status in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT):
        response["x-goog-generation"] = found


def insert(request, response, storage, *args, **kwargs):
    wanted, name = (request.query.get(field, [""])[0] for field in ("ifGenerationMatch", "name"))
    if wanted and wanted != _generation(storage, request.params["bucket_name"], name):
        request.data  # noqa: B018  what is not read would be taken for the next request
        response.status = HTTPStatus.PRECONDITION_FAILED
        return
    EMULATORS[1](request, response, storage, *args, **kwargs)


def create_server(port, bucket):
    """A server that answers on 127.0.0.1:`port` between its `start()` and `stop()`; in memory, with an empty bucket."""
    ours = dict(zip(EMULATORS, (download, insert), strict=True))
    for _, methods in server.HANDLERS:
        methods.update({method: ours[handler] for method, handler in methods.items() if handler in ours})
    objects.download = download  # what `objects.get` calls for an object's content
    return server.create_server("127.0.0.1", port, in_memory=True, default_bucket=bucket)
