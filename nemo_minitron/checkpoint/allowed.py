"""Names that a pickle may have where Megatron or NeMo unpickle it: they would import and call what it names."""

from __future__ import annotations

import re

from nemo_minitron.checkpoint.record import Read, RecordError, names_in
from nemo_minitron.errors import MinitronError

OBJECT_LIMIT = 16 << 20

# What Megatron-Core, NeMo, Lightning and Transformer Engine leave in their files: classes of data, each in the module
# that defines it. No pattern spans a dot: ``torch.distributed.checkpoint.filesystem.os.system`` is a name, too.
_ALLOWED = re.compile(
    r"collections\.(OrderedDict|defaultdict)|argparse\.Namespace|typing\.Any|_io\.BytesIO|_codecs\.encode"
    r"|copyreg\._reconstructor|signal\.Signals|datetime\.(datetime|date|time|timedelta|timezone)"
    r"|pathlib(\._local)?\.(Pure)?(Posix|Windows)?Path"
    r"|(builtins|__builtin__)\.(set|frozenset|bytearray|bytes|complex|slice|list|dict|tuple|int|long|float|bool|str|object)"
    r"|torch\.(\w+Storage|Size|device|dtype|Generator|(b?float|u?int|complex|bool)\w*)"
    r"|torch\.storage\.(Typed|Untyped)Storage|torch\.serialization\._get_layout|torch\._utils\._rebuild_\w+"
    r"|torch\.nn\.parameter\.(Parameter|Buffer)|torch\._tensor\._rebuild_from_type_v2"
    r"|torch\.distributed\.checkpoint\.metadata\.(Metadata|MetadataIndex|StorageMeta|TensorProperties|_MEM_FORMAT_ENCODING)"
    r"|torch\.distributed\.checkpoint\.metadata\.(Chunk|Tensor|Bytes)StorageMetadata"
    r"|torch\.distributed\.checkpoint\.filesystem\.(_StorageInfo|_StoragePrefix)"
    r"|torch\.distributed\.checkpoint\.planner\.(SavePlan|WriteItem|WriteItemType|TensorWriteData|BytesIOWriteData)"
    r"|torch\.distributed\._shard\.(sharded_tensor\.metadata|metadata)\.(TensorProperties|MEM_FORMAT_ENCODING|Shard\w*Metadata)"
    r"|megatron\.core\.dist_checkpointing\.strategies\.torch\.MCoreSavePlan"
    r"|megatron\.core\.dist_checkpointing\.mapping\.(Sharded(Tensor|Object|TensorFactory)|LocalNonpersistentObject)"
    r"|megatron\.core\.((transformer\.)?enums|rerun_state_machine)\.[A-Z]\w*"
    r"|megatron\.core\.transformer\.pipeline_parallel_layer_layout\.PipelineParallelLayerLayout"
    r"|megatron\.core\.transformer\.transformer_config\.(MLA)?TransformerConfig"
    r"|megatron\.core\.model_parallel_config\.ModelParallelConfig"
    r"|transformer_engine\.common\.recipe\.(_FormatHelper|[A-Z]\w*)"
    r"|omegaconf\.(base|nodes|listconfig|dictconfig)\.[A-Z]\w*"
    r"|numpy\.(ndarray|dtype)|numpy\._?core\.(multiarray\.(_reconstruct|scalar)|numeric\._frombuffer)"
    r"|numpy\.random\._(pickle\.\w+_ctor|mt19937\.MT19937|pcg64\.PCG64)"
    r"|(lightning|pytorch_lightning|lightning_fabric)(\.fabric)?\.utilities\.(data|parsing)\.AttributeDict"
)


def is_allowed(name: str) -> bool:
    """Whether ``module.name`` may stand in a checkpoint's pickle."""
    return _ALLOWED.fullmatch(name) is not None


def check_names(read: Read, length: int, where: str, limit: int = OBJECT_LIMIT) -> None:
    """Refuse a record or file whose pickle names what has no place in a checkpoint, without unpickling it.

    Raises:
        MinitronError: naming the first of them, or what is wrong with the pickle.
    """
    try:
        foreign = sorted(name for name in names_in(read, length, limit) if not is_allowed(name))
    except RecordError as error:
        raise MinitronError(f"{where} is refused: {error}") from None
    if foreign:
        raise MinitronError(f"{where} is refused: '{foreign[0]:.200}' has no place in it")
