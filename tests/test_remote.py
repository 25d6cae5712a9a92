import dataclasses
import os
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import fsspec
import pytest
from conftest import ROOT, write_photos
from test_builders import files, flip, prepare, read, truncate

from ccl_jax.data import manifest, remote
from ccl_jax.data.layouts import read_mvtec


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    return read_mvtec(write_photos(tmp_path_factory.mktemp("data") / "photos"))


@pytest.fixture
def local(split, tmp_path):
    """A folder of whole shards."""
    prepare(split, tmp_path / "local")
    return tmp_path / "local"


@pytest.fixture
def memory():
    """A URL of fsspec's own memory, which lasts as long as this process."""
    url = f"memory://bucket/{uuid.uuid4()}"
    yield url
    store, root = fsspec.core.url_to_fs(url)
    if store.exists(root):
        store.rm(root, recursive=True)


def stored(url):
    """Everything at a URL, by its path below it."""
    store, root = fsspec.core.url_to_fs(url)
    return {name.removeprefix(root + "/"): store.cat_file(name) for name in store.find(root)}


def put(url, name, content):
    store, root = fsspec.core.url_to_fs(url)
    store.pipe_file(f"{root}/{name}", content)


def shard_names(folder):
    return [shard.file for shard in manifest.read(folder).shards]


def test_a_url_has_a_scheme_and_a_folder_has_none():
    assert remote.is_url("gs://bucket/mvtec") and remote.is_url("file:///data")
    assert not remote.is_url("/data/mvtec") and not remote.is_url("mvtec") and not remote.is_url("")


def test_every_url_has_its_own_folder_below_the_cache(tmp_path, monkeypatch):
    folders = {
        remote.copy_folder(url, str(tmp_path)) for url in ("gs://a/x", "gs://b/x", "s3://a/x")
    }
    assert len(folders) == 3 and {folder.parent for folder in folders} == {tmp_path}
    assert remote.copy_folder("gs://a/x/", str(tmp_path)) in folders
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert str(remote.copy_folder("gs://a/x", "")).startswith("/somewhere/ccl_jax/x-")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert remote.copy_folder("gs://a/x", "").parent == Path.home() / ".cache/ccl_jax"


def test_what_is_published_comes_back_the_same(split, local, memory, tmp_path):
    shards = len(shard_names(local))
    assert remote.publish(local, memory) == shards
    seen = []
    copy = tmp_path / "cache/copy"
    progress = lambda done, total: seen.append((done, total))  # noqa: E731
    assert remote.fetch(memory, copy, progress=progress) == shards
    assert seen == [(done, shards) for done in range(1, shards + 1)]
    assert [r.key for r in read(copy, full=True).test] == [r.key for r in split.test]
    theirs = {name: content for name, (_, content) in files(local).items()}
    assert {name: content for name, (_, content) in files(copy).items()} == {
        name: content for name, content in theirs.items() if name not in remote.TFDS_FILES
    }
    assert remote.TFDS_FILES[0] in stored(memory)


def test_what_is_there_is_neither_fetched_nor_published_again(local, memory, tmp_path):
    remote.publish(local, memory)
    remote.fetch(memory, tmp_path / "copy")
    before = files(tmp_path / "copy")
    assert remote.fetch(memory, tmp_path / "copy") == 0
    assert files(tmp_path / "copy") == before
    assert remote.publish(local, memory) == 0
    assert remote.publish(tmp_path / "copy", memory) == 0


def test_any_file_system_of_fsspec_will_do(split, local, tmp_path):
    url = f"file://{tmp_path}/store/a b ü"
    remote.publish(local, url)
    remote.fetch(url, tmp_path / "copy")
    assert len(read(tmp_path / "copy", full=True).train) == len(split.train)


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
def test_a_local_copy_that_is_damaged_is_fetched_again(local, memory, tmp_path, damage):
    remote.publish(local, memory)
    copy = tmp_path / "copy"
    remote.fetch(memory, copy)
    damage(copy / shard_names(copy)[1])
    assert remote.fetch(memory, copy, full=True) == 1
    read(copy, full=True)


def test_an_interrupted_fetch_keeps_what_has_the_right_checksum(local, memory, tmp_path):
    remote.publish(local, memory)
    copy = tmp_path / "copy"
    remote.fetch(memory, copy)
    (copy / manifest.NAME).unlink()  # it comes last
    names = shard_names(local)
    (copy / names[0]).unlink()
    flip(copy / names[1])  # of the right size
    (copy / f".{names[0]}.partial").write_bytes(b"half of it")
    assert remote.fetch(memory, copy) == 2
    read(copy, full=True)
    assert not list(copy.glob(".*.partial"))


def test_a_shard_that_is_damaged_at_the_url_is_refused_and_never_appears(local, memory, tmp_path):
    remote.publish(local, memory)
    name = shard_names(local)[1]
    content = stored(memory)[name]
    put(memory, name, content[:-1] + b"x")
    with pytest.raises(
        ValueError, match=rf"{name} in .* another checksum .*delete it there .*--job p"
    ):
        remote.fetch(memory, tmp_path / "copy")
    assert not (tmp_path / "copy" / name).exists()
    assert not (tmp_path / "copy" / manifest.NAME).exists()
    put(memory, name, content)
    assert remote.fetch(memory, tmp_path / "copy") == len(shard_names(local)) - 1


def test_a_shard_that_is_missing_at_the_url_is_named_and_published_again(local, memory, tmp_path):
    remote.publish(local, memory)
    store, root = fsspec.core.url_to_fs(memory)
    name = shard_names(local)[-1]
    store.rm(f"{root}/{name}")
    with pytest.raises(ValueError, match=rf"{name} is missing in config\.data\.prepared=memory://"):
        remote.fetch(memory, tmp_path / "copy")
    assert remote.publish(local, memory) == 1
    remote.fetch(memory, tmp_path / "copy")


def test_a_publication_that_was_interrupted_goes_on(local, memory):
    remote.publish(local, memory)
    whole = stored(memory)
    store, root = fsspec.core.url_to_fs(memory)
    store.rm(f"{root}/{manifest.NAME}")
    put(memory, shard_names(local)[0], b"half")
    assert remote.publish(local, memory) > 0
    assert stored(memory) == whole


def test_data_that_were_prepared_anew_replace_the_copy(split, local, memory, tmp_path):
    remote.publish(local, memory)
    copy = tmp_path / "copy"
    remote.fetch(memory, copy)
    shutil.rmtree(local)
    prepare(split, local, image_size=64)
    with pytest.raises(
        ValueError, match=r"memory://.* holds data prepared with .*delete all below"
    ):
        remote.publish(local, memory)
    store, root = fsspec.core.url_to_fs(memory)
    store.rm(root, recursive=True)
    assert remote.publish(local, memory) == len(shard_names(local))
    assert remote.fetch(memory, copy) == len(shard_names(local))
    assert manifest.read(copy) == manifest.read(local)
    read(copy, full=True)


def test_a_second_machine_publishes_only_what_is_missing_and_leaves_a_whole_state(
    split, local, memory, tmp_path
):
    remote.publish(local, memory)
    for record in (*split.train, *split.test):
        os.utime(record.image, ns=(0, 0))
    second = tmp_path / "second"
    prepare(split, second)
    assert manifest.read(second) != manifest.read(local)  # the listings know the times
    before = stored(memory)
    assert remote.publish(second, memory) == 0
    assert stored(memory) == before
    store, root = fsspec.core.url_to_fs(memory)
    store.rm(f"{root}/{shard_names(local)[1]}")
    assert remote.publish(second, memory) == 1
    remote.fetch(memory, tmp_path / "copy", full=True)
    assert len(read(tmp_path / "copy", full=True).test) == len(split.test)


def test_a_copy_that_was_fetched_can_be_prepared_and_published_to_an_empty_store(
    split, local, memory, tmp_path
):
    remote.publish(local, memory)
    remote.fetch(memory, tmp_path / "copy")
    whole = stored(memory)
    store, root = fsspec.core.url_to_fs(memory)
    store.rm(root, recursive=True)
    prepare(split, tmp_path / "copy")
    remote.publish(tmp_path / "copy", memory)
    assert stored(memory).keys() == whole.keys()


@pytest.mark.parametrize("name", ["../../stolen", "{}/stolen"])
def test_a_manifest_at_a_url_cannot_name_files_outside_the_copy(local, memory, tmp_path, name):
    remote.publish(local, memory)
    name = name.format(tmp_path)
    found = manifest.read(local)
    shard = found.shards[0]
    changed = dataclasses.replace(found, shards=[shard._replace(file=name), *found.shards[1:]])
    put(memory, manifest.NAME, changed.to_json().encode())
    put(memory, name, (local / shard.file).read_bytes())
    with pytest.raises(
        ValueError, match=r"memory://.*prepared\.json is damaged \(it names .*stolen"
    ):
        remote.fetch(memory, tmp_path / "cache/deep/copy")
    assert not list(tmp_path.rglob("*stolen*"))


def test_a_url_without_prepared_data_is_named_with_the_command(local, memory, tmp_path):
    assert remote.manifest_at(memory) is None
    with pytest.raises(ValueError, match=r"=memory://.* holds no prepared data; .*--job prepare"):
        remote.fetch(memory, tmp_path / "copy")
    found = manifest.read(local)
    put(memory, manifest.NAME, found.to_json().replace('"shards": [', '"x": [').encode())
    with pytest.raises(ValueError, match=r"memory://.*prepared\.json is damaged"):
        remote.fetch(memory, tmp_path / "copy")


def test_data_that_are_not_prepared_to_the_end_are_refused(split, memory, tmp_path):
    half = tmp_path / "half"
    with pytest.raises(KeyboardInterrupt):
        prepare(split, half, progress=stop)
    with pytest.raises(ValueError, match=r"half is not prepared to the end"):
        remote.publish(half, memory)
    put(memory, manifest.NAME, (half / manifest.NAME).read_bytes())
    with pytest.raises(ValueError, match=r"holds data that are not prepared to the end"):
        remote.fetch(memory, tmp_path / "copy")


def stop(done, total):
    raise KeyboardInterrupt


def test_a_store_that_nobody_knows_or_that_lacks_a_package_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"config\.data\.prepared=nosuch://x .*pip install gcsfs"):
        remote.fetch("nosuch://x", tmp_path / "copy")


class Broken(fsspec.get_filesystem_class("memory")):
    """A store that fails, each kind of access in its own way."""

    protocol = "broken"
    cachable = False
    fails = ""

    def _fail(self, what):
        if Broken.fails == what:
            raise ConnectionError(f"no {what}")

    def exists(self, path, **kwargs):
        self._fail("look")
        return super().exists(path, **kwargs)

    def get_file(self, *arguments, **kwargs):
        self._fail("get")
        return super().get_file(*arguments, **kwargs)

    def put_file(self, *arguments, **kwargs):
        self._fail("put")
        return super().put_file(*arguments, **kwargs)


@pytest.mark.parametrize("what", ["look", "get", "put"])
def test_a_store_that_fails_is_named_and_the_same_command_goes_on(
    local, tmp_path, what, monkeypatch
):
    fsspec.register_implementation("broken", Broken, clobber=True)
    url = f"broken://{uuid.uuid4()}"
    if what != "put":
        remote.publish(local, url)
    monkeypatch.setattr(Broken, "fails", what)
    with pytest.raises(ValueError, match=rf"{url[:8]}|fetched \(no get\)") as error:
        remote.publish(local, url) if what == "put" else remote.fetch(url, tmp_path / "copy")
    assert f"no {what}" in str(error.value)
    monkeypatch.setattr(Broken, "fails", "")
    remote.publish(local, url)
    remote.fetch(url, tmp_path / "copy")
    read(tmp_path / "copy", full=True)


def test_a_cache_that_cannot_be_written_is_named(local, memory, tmp_path):
    remote.publish(local, memory)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"config\.data\.cache_dir=.*file/copy cannot be written"):
        remote.fetch(memory, tmp_path / "file/copy")


def test_of_two_processes_that_start_together_one_fetches(split, local, tmp_path):
    url = f"file://{tmp_path}/store"
    remote.publish(local, url)
    code = (
        "import sys; from pathlib import Path; from ccl_jax.data import remote;"
        "print(remote.fetch(sys.argv[1], Path(sys.argv[2])))"
    )
    words = [sys.executable, "-c", code, url, str(tmp_path / "cache/copy")]
    children = [
        subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    counts = sorted(int(child.communicate(timeout=100)[0]) for child in children)
    assert counts == [0, len(shard_names(local))]
    assert len(read(tmp_path / "cache/copy", full=True).test) == len(split.test)
