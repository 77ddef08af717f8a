"""`upload`: the command that copies a finished output to an address."""

from __future__ import annotations

import os
from pathlib import Path

import click

from fastinterp.cli import grammar, options
from fastinterp.errors import UsageError


@click.command()
@click.argument("output")
@click.argument("address")
@click.option("--force", is_flag=True, help="Replace a model that is there, or what an upload that failed left of one.")
@options.quiet
@options.as_json
def upload(output: str, address: str, force: bool, quiet: bool, as_json: bool) -> None:
    """Upload a finished output to an address.

    OUTPUT is a folder or a file of weights here, ADDRESS where it goes: s3://bucket/merged, gs://bucket/merged, or of
    any other protocol that fsspec writes. Index and configuration go last. `fastinterp merge` and the other commands
    upload what they make themselves, if their OUT is an address: this is for what is here already. To the Hugging Face
    Hub: `hf upload`.

    \b
    Example:
      fastinterp upload merged/ s3://bucket/merged
    """
    from fastinterp.checkpoint.names import names_file, shell_word
    from fastinterp.checkpoint.open import open_checkpoint
    from fastinterp.messages import counted, plain, size
    from fastinterp.output.url_upload import Destination, files_of
    from fastinterp.presence import exists, is_folder
    from fastinterp.urls import is_url, mistyped, path_of_file, scheme_of

    options.refuse_ranks("upload")
    output, address = path_of_file(output) or output, grammar.output_of(address)
    if not is_url(address):
        copy = f" To copy it on this machine: `cp -r {shell_word(output)} {shell_word(address)}`"
        instead = mistyped(address) or (copy if exists(output) else "")
        raise UsageError(f"upload needs an address, as s3://bucket/merged, got {address!r}.{instead}")
    if scheme_of(address) == "hf":
        name = address.partition("://")[2]
        raise UsageError(
            f"{address} is on the Hub. Use `hf upload {shell_word(name)} {shell_word(output)} . --private`"
        )
    if is_url(output):
        raise UsageError(f"{output} is an address. Name a folder or a file that is here")
    open_checkpoint(output)  # it is one, and complete
    local = Path(os.path.expanduser(output))
    if is_folder(local) and names_file(address):
        raise UsageError(f"{output} is a folder, and {address} the name of a file. Name a folder there")
    if not is_folder(local) and not names_file(address):
        address = f"{address.rstrip('/')}/{local.name}"
    to = Destination(address, force)
    nbytes = to.upload(local)
    if as_json:
        options.say_json({"output": to.url, "bytes": nbytes})
    elif not quiet:
        options.say(plain(f"{to.url}: {counted(len(files_of(local)), 'file')}, {size(nbytes)}"))
