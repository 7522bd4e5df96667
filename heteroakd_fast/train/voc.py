"""Pascal VOC 2012, alone or with the masks of SBD (Semantic Boundaries Dataset)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .config import DataConfig
from .data import SegmentationData
from .errors import DataError, DependencyError
from .pairs import Encoding, FileSource, Folders, check_files, pair_up
from .pictures import Mask, check_regular

CLASS_NAMES = (
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
_BORDER = 255  # around objects

_LAYOUT = (
    "VOC 2012 as JPEGImages/*.jpg, SegmentationClass/*.png and "
    "ImageSets/Segmentation/{train,val}.txt in data.root, in its VOC2012/ or VOCdevkit/VOC2012/"
)
_SBD_LAYOUT = (
    'data.voc_split = "trainaug" needs the masks of SBD: either SegmentationClassAug/*.png with '
    "ImageSets/Segmentation/trainaug.txt in VOC2012, or SBD's own folder (cls/*.mat, train.txt, "
    "val.txt) as data.sbd_root, or beside VOC2012 as VOCaug/dataset or benchmark_RELEASE/dataset"
)


def palette(count: int) -> tuple[tuple[int, int, int], ...]:
    """The colours of VOC: the bits of the class go in turn to red, green and blue."""
    return tuple(
        (_channel(index), _channel(index >> 1), _channel(index >> 2)) for index in range(count)
    )


def _channel(bits: int) -> int:
    """Every third bit of `bits`, the lowest first."""
    return sum((bits >> 3 * place & 1) << 7 - place for place in range(8))


def load_voc(config: DataConfig) -> SegmentationData:
    """The splits that ImageSets/Segmentation lists, or trainaug in place of train."""
    folders = Folders(_LAYOUT)
    root = _find_root(config)
    mask_classes = Encoding(
        tuple((index, index) for index in range(len(CLASS_NAMES))),
        (_BORDER,),
        config.ignore_index,
        f"0 to {len(CLASS_NAMES) - 1} or {_BORDER} (ignored)",
    )
    lists = root / "ImageSets" / "Segmentation"
    for name in ("JPEGImages", "SegmentationClass"):
        folders.names(root / name)

    def source(stems: list[str], list_path: Path, *more: tuple[Path, str]) -> FileSource:
        """`more`: folder and suffix of masks for stems without one of VOC's own."""
        images = [root / "JPEGImages" / f"{stem}.jpg" for stem in stems]
        missing = [image for image in images if not folders.holds(image)]
        if missing:
            also = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise DataError(f"{missing[0]}: no such picture, but {list_path} names it{also}")
        places = ((root / "SegmentationClass", ".png"), *more)

        def masks(image: Path) -> tuple[Path, ...]:
            return tuple(folder / f"{image.stem}{suffix}" for folder, suffix in places)

        pairs = pair_up(images, masks, folders)
        return FileSource(pairs, (("", mask_classes),), ((".mat", read_sbd_mask),))

    val_stems = _stems(lists / "val.txt")
    val = source(val_stems, lists / "val.txt")
    train_list = lists / "train.txt"
    if config.voc_split == "train":
        train = source(_stems(train_list), train_list)
    elif config.sbd_root is None and (root / "SegmentationClassAug").is_dir():
        # The lists in use differ in whether they repeat VOC's own; none may hold what is validated.
        aug_list = lists / "trainaug.txt"
        if not aug_list.exists():
            raise DataError(f"{aug_list}: no such list; {_SBD_LAYOUT}")
        stems = sorted(set(_stems(aug_list)) - set(val_stems))
        train = source(stems, aug_list, (root / "SegmentationClassAug", ".png"))
    else:
        sbd = _find_sbd(config, root)
        _load_mat_reader(sbd)
        listed = {*_stems(sbd / "train.txt"), *_stems(sbd / "val.txt"), *_stems(train_list)}
        stems = sorted(listed - set(val_stems))
        train = source(stems, sbd / "train.txt", (sbd / "cls", ".mat"))
    check_files(train, val, config)
    return SegmentationData(train, val, CLASS_NAMES, palette(len(CLASS_NAMES)), config.ignore_index)


def _find_root(config: DataConfig) -> Path:
    assert config.root is not None  # the configuration requires it
    root = config.root.expanduser()
    for folder in (root, root / "VOC2012", root / "VOCdevkit" / "VOC2012"):
        if (folder / "ImageSets").is_dir() or (folder / "JPEGImages").is_dir():
            return folder
    raise DataError(f"{root}: no such folder, or nothing of VOC 2012 in it; expected {_LAYOUT}")


def _find_sbd(config: DataConfig, root: Path) -> Path:
    names = (Path("VOCaug", "dataset"), Path("benchmark_RELEASE", "dataset"))
    places = [parent / name for parent in (root, *list(root.parents)[:2]) for name in names]
    if config.sbd_root is not None:
        sbd = config.sbd_root.expanduser()
        places = [sbd, sbd / "dataset", *(sbd / name for name in names)]
    for folder in places:
        if (folder / "cls").is_dir():
            return folder
    where = config.sbd_root or root
    raise DataError(f"{where}: holds no masks of SBD; {_SBD_LAYOUT}")


def _stems(path: Path) -> list[str]:
    """The pictures a list names: a stem a line, or a path or two."""
    try:
        check_regular(path)
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise DataError(f"{path}: no such list; expected {_LAYOUT}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as a list of pictures: {error}") from None
    stems = [Path(line.split()[0]).stem for line in lines if line.strip()]
    if not stems:
        raise DataError(f"{path}: names no picture; expected one a line, such as 2007_000032")
    return stems


def _load_mat_reader(sbd: Path) -> None:
    """Say before training that .mat files cannot be read here."""
    try:
        import scipy.io  # noqa: F401
    except ImportError:
        raise DependencyError(
            f"{sbd / 'cls'}: holds .mat files, which scipy reads, and it is not installed: "
            "pip install scipy"
        ) from None


def read_sbd_mask(path: Path) -> Mask:
    """The class ids in one of SBD's .mat files."""
    from scipy.io import loadmat

    try:
        check_regular(path)
        content = loadmat(str(path), variable_names=["GTcls"])
        values = np.asarray(content["GTcls"]["Segmentation"][0, 0])
    except DataError:
        raise
    except Exception as error:  # its parser lets through whatever a broken file makes it meet
        raise DataError(
            f"{path}: cannot be read as a mask of SBD (GTcls.Segmentation): {error!r}"
        ) from None
    if values.ndim != 2 or values.dtype.kind not in "ui":
        raise DataError(
            f"{path}: {values.dtype} with {values.ndim} axes in GTcls.Segmentation, "
            "expected class ids, height x width"
        )
    return values.astype(np.uint8 if values.dtype == np.uint8 else np.int64, copy=False)
