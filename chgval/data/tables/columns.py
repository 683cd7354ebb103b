"""Which columns of Parquet files hold images, labels and ids, in the conventions of Hugging Face datasets."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa

from chgval.errors import DataError, first_few, first_line

IMAGE_NAMES = ("image", "img", "pixel_values", "picture", "photo")
SHOWN_COLUMNS = 30
# Encoded images, and what they were called.
IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
LABEL_NAMES = ("label", "labels", "target", "class", "category", "y", "fine_label", "cls")
ID_NAMES = ("id", "image_id", "file_name", "filename", "__key__")


def huggingface_features(schema: pa.Schema) -> dict[str, dict[str, object]]:
    """Return what the metadata of Hugging Face datasets says of every column, if anything."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"].items()
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return {}
    # Older descriptions of lists are a list of one.
    hints = {
        name: {"feature": hint[0]} if isinstance(hint, list) and hint else hint for name, hint in features
    }
    return {name: hint for name, hint in hints.items() if isinstance(hint, dict)}


def class_names(schema: pa.Schema, column: str) -> list[str] | None:
    """Return the names of the classes that a column's integers stand for, if the metadata has them."""
    hint: object = huggingface_features(schema).get(column, {})
    while isinstance(hint, dict) and "feature" in hint:  # lists of classes
        hint = hint["feature"]
    names = hint.get("names") if isinstance(hint, dict) else None
    if not isinstance(names, list):
        return None
    return [str(name).encode("utf-8", "backslashreplace").decode() for name in names]


def find_image_column(source: str, schema: pa.Schema, name: str | None) -> str:
    """Return the column of images: the named one, or by metadata, type and name.

    Raises:
        DataError: there is none, several could be it, or the named one cannot be.
    """
    if name is not None:
        check_column(source, schema, "--image-column", name, is_image, "a struct {bytes, path} or binary")
        return name
    candidates = [field.name for field in schema if is_image(field.type)]
    hints = huggingface_features(schema)
    preferred = [n for n in candidates if hints.get(n, {}).get("_type") == "Image"]
    preferred = preferred or [n for n in IMAGE_NAMES if n in candidates] or candidates
    if len(preferred) > 1:
        preferred = [n for n in IMAGE_NAMES if n in preferred][:1] or preferred
    if len(preferred) == 1:
        return preferred[0]
    if candidates:
        raise DataError(
            f"{source}: columns {', '.join(candidates)} could all hold the images; pass --image-column."
        )
    several = [field.name for field in schema if is_list(field.type) and is_image(field.type.value_type)]
    if several:
        raise DataError(
            f"{source}: column '{several[0]}' holds lists of images; write one image for each row, such as "
            "the first of each list."
        )
    lists = vector_columns(schema)
    of_bytes = [name for name in lists if pa.types.is_uint8(schema.field(name).type.value_type)]
    advice = "images are structs or binary"
    if of_bytes:
        advice = f"'{of_bytes[0]}' holds lists of bytes; write encoded images as binary"
    elif lists:
        named = f"--features-column {lists[0]}"
        advice = f"'{lists[0]}' holds embeddings: value, detect-noise, select and train take {named}"
    raise DataError(f"{source}: no image column found; {_columns_are(schema)}; {advice}.")


def find_label_columns(source: str, schema: pa.Schema, names: Sequence[str]) -> tuple[str, ...]:
    """Return the columns of labels: the named ones, or one by metadata, type and name.

    Several columns hold labels of several annotators, and so does a column of lists.

    Raises:
        DataError: there is none, or the named ones cannot be.
    """
    expected = "integers, strings or booleans"
    also, more = pa.types.is_null, ""  # one of several annotators may have labelled nothing
    if len(names) == 1:
        also, more = is_label_list, ", or lists of these"
    for name in names:
        check_column(
            source,
            schema,
            "--label-column",
            name,
            lambda kind: _is_label(kind) or also(kind),
            expected + more,
        )
    if len({_label_type(schema.field(name).type) for name in names} - {"nothing"}) > 1:
        kinds = ", ".join(f"'{name}' {schema.field(name).type}" for name in names)
        raise DataError(
            f"{source}: columns {kinds} cannot hold the same classes; --label-column needs one type."
        )
    if names:
        return tuple(names)
    return (_label_column(source, schema),)


def _label_column(source: str, schema: pa.Schema) -> str:
    candidates: list[str] = [field.name for field in schema if _is_label(field.type)]
    if "label" in candidates:
        return "label"
    # Whatever else is there is not what somebody called the label, unless that is an image, as of a mask.
    if "label" in schema.names and not is_image(schema.field("label").type):
        raise DataError(f"{source}: {_unfit(schema, 'label', candidates)}.")
    hints = huggingface_features(schema)
    class_labels = [
        name
        for name in candidates
        if hints.get(name, {}).get("_type") == "ClassLabel" and not _is_original(schema, name)
    ]
    if len(class_labels) == 1:
        return class_labels[0]
    for preferred in LABEL_NAMES:
        if preferred in candidates and not (preferred == "y" and "x" in schema.names):  # of a place
            return preferred
    unfit = next((n for n in LABEL_NAMES if n in schema.names), None)
    if unfit is not None:
        raise DataError(f"{source}: {_unfit(schema, unfit, candidates)}.")
    raise DataError(
        f"{source}: column 'label' not found; {_columns_are(schema)}; pass a column of integers, strings or "
        "booleans with --label-column."
    )


def _unfit(schema: pa.Schema, name: str, candidates: Sequence[str]) -> str:
    """Say why a column cannot be the one of labels, and which could."""
    kind = schema.field(name).type
    others = [other for other in candidates if not _is_original(schema, other)]
    advice = f"{_columns_are(schema)}; pass a column of integers, strings or booleans with --label-column"
    if others:
        advice = f"pass --label-column with the one of labels: {', '.join(others)}"
    if is_label_list(kind):
        return (
            f"column '{name}' holds {kind}: several labels of one sample (multi-label) are not supported; if "
            f"several annotators gave these, pass --label-column {name}; else {advice}"
        )
    return f"column '{name}' holds {kind}; {advice}"


def original_column(label_column: str) -> str:
    """Return the name of the column that keeps labels as they were before others were put in their place."""
    return f"original_{label_column}"


def _is_original(schema: pa.Schema, name: str) -> bool:
    return name.rstrip("_") in map(original_column, schema.names)


def find_id_column(source: str, schema: pa.Schema, name: str | None) -> str | None:
    """Return the column of ids, if there is one: the named one, or by type and name.

    Raises:
        DataError: the named one cannot hold ids.
    """
    if name is not None:
        check_column(source, schema, "--id-column", name, _is_id, "strings or integers")
        return name
    return next((n for n in ID_NAMES if n in schema.names and _is_id(schema.field(n).type)), None)


def check_column(
    source: str, schema: pa.Schema, option: str, name: str, fits: Callable[[pa.DataType], bool], expected: str
) -> None:
    """Raise DataError where the column that an option names is missing or of another type."""
    if name not in schema.names:
        raise DataError(f"{source}: column '{name}' not found; {_columns_are(schema)}. Fix {option}.")
    kind = schema.field(name).type
    if not fits(kind):
        raise DataError(f"{source}: column '{name}' holds {kind}; {option} needs {expected}.")


def _columns_are(schema: pa.Schema) -> str:
    names = [name if name == name.strip() and name else repr(name) for name in schema.names]
    return f"columns are {first_few(names, SHOWN_COLUMNS)}"


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def is_image(kind: pa.DataType) -> bool:
    """Say whether a type can hold encoded images: a struct with bytes (and a path), or binary."""
    if pa.types.is_struct(kind):
        has_bytes = kind.get_field_index("bytes") >= 0 and _is_binary(kind.field("bytes").type)
        path = kind.field("path").type if kind.get_field_index("path") >= 0 else pa.null()
        return has_bytes and (is_text(path) or pa.types.is_null(path))
    return _is_binary(kind)


def is_text(kind: pa.DataType) -> bool:
    """Say whether a type holds text, as it is or in a dictionary."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_label(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    number = pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_floating(kind)
    # Databases write integers as decimals without a fraction.
    return bool(number or is_text(kind) or (pa.types.is_decimal(kind) and kind.scale == 0))


def is_label_list(kind: pa.DataType) -> bool:
    """Say whether a type can hold the labels that several annotators gave; fractions are features."""
    return is_list(kind) and _is_label(kind.value_type) and not pa.types.is_floating(kind.value_type)


def _label_type(kind: pa.DataType) -> str:
    if pa.types.is_null(kind):
        return "nothing"
    return "text" if is_text(kind) else "boolean" if pa.types.is_boolean(kind) else "number"


def _is_id(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_integer(kind) or is_text(kind))


def is_list(kind: pa.DataType) -> bool:
    """Say whether a type holds lists."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def is_vector(kind: pa.DataType) -> bool:
    """Say whether a type can hold embeddings: lists of numbers."""
    return bool(
        is_list(kind) and (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type))
    )


def vector_columns(schema: pa.Schema) -> list[str]:
    """Return the columns that can hold embeddings."""
    return [field.name for field in schema if is_vector(field.type)]


def as_column(file: str, name: str, values: Sequence[Any]) -> pa.Array:
    """Return values of a file as a column; those of several types, which are no labels, as JSON.

    Raises:
        DataError: labels are of several types.
    """
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError, ValueError, TypeError) as error:
        if name in LABEL_NAMES:
            raise DataError(
                f"{file}: '{name}' holds values of several types ({first_line(error)}); give all one type."
            ) from error
        return pa.array([None if value is None else json.dumps(value) for value in values])
