"""Writes the sample records of configs/tiny/sample, byte for byte the same each time.

    python tools/make_sample_data.py --output_dir configs/tiny/sample

The records have the form of ADGEN (attributes of a garment -> advert), but no word of it: garments are drawn
from the tables below, and the advert follows from the attributes. What each sentence says is settled by one
attribute or two, so that a model of two layers can learn the rule and be right about garments it never saw.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path

# Class -> (measure word, the key and values of the garment itself, the key and phrases of its detail).
CLASSES = {
    "裙": (
        "条",
        ("裙长", {"长裙": "雪纺 蕾丝 真丝 棉麻", "短裙": "牛仔 蕾丝 针织", "连衣裙": "雪纺 真丝 针织 棉麻",
                "半身裙": "针织 雪纺 牛仔", "吊带裙": "真丝 雪纺 蕾丝"}),
        ("裙型", {"A字": "A字裙摆遮肉显瘦", "百褶": "百褶裙摆灵动飘逸", "鱼尾": "鱼尾裙摆摇曳生姿",
                "荷叶边": "荷叶边裙摆很灵巧"}),
    ),
    "上衣": (
        "件",
        ("衣样式", {"衬衫": "雪纺 真丝 棉麻 牛仔", "卫衣": "纯棉 针织", "外套": "牛仔 羊毛 棉麻",
                 "毛衣": "羊毛 针织", "T恤": "纯棉 针织"}),
        ("衣领型", {"圆领": "圆领设计舒适自在", "翻领": "翻领设计干练利落", "V领": "V领设计修饰脸型",
                 "高领": "高领设计温暖贴心"}),
    ),
    "裤": (
        "条",
        ("裤型", {"阔腿裤": "雪纺 棉麻 针织", "直筒裤": "牛仔 羊毛 棉麻", "九分裤": "牛仔 纯棉",
                "背带裤": "牛仔 纯棉", "休闲裤": "纯棉 棉麻 针织"}),
        ("裤腰型", {"高腰": "高腰设计拉长双腿", "中腰": "中腰设计贴合身形", "松紧腰": "松紧腰身穿脱方便",
                 "系带腰": "系带腰身随心调节"}),
    ),
}  # fmt: skip
COLORS = ("白色", "黑色", "蓝色", "粉色", "红色", "绿色", "灰色", "黄色")
# Clauses about fit and pattern, by class.
FITS = {
    "裙": {"宽松": "宽松裙身轻盈自在", "修身": "修身裁剪勾勒曲线", "廓形": "廓形设计大方优雅",
          "显瘦": "显瘦版型凸显身材"},
    "上衣": {"宽松": "宽松衣身舒适随性", "修身": "修身款式干净清爽", "廓形": "廓形剪裁帅气有型",
           "显瘦": "显瘦版型轻松驾驭"},
    "裤": {"宽松": "宽松裤腿行走自如", "修身": "修身裤型修饰腿部", "廓形": "廓形裤管率性洒脱",
          "显瘦": "显瘦版型优化比例"},
}  # fmt: skip
PATTERNS = {
    "裙": {"碎花": "碎花点缀浪漫迷人", "条纹": "条纹装饰明快生动", "格子": "格子图案温婉耐看",
          "印花": "印花图案别致亮眼", "波点": "波点元素俏皮可爱", "刺绣": "刺绣细节精致动人"},
    "上衣": {"碎花": "碎花图案温柔可人", "条纹": "条纹元素充满活力", "格子": "格子图案经典百搭",
           "印花": "胸前印花吸引目光", "波点": "波点装饰减龄养眼", "刺绣": "刺绣点缀巧夺天工"},
    "裤": {"碎花": "碎花元素清爽宜人", "条纹": "侧边条纹显高显瘦", "格子": "格子花纹英伦十足",
          "印花": "印花装饰个性张扬", "波点": "波点图案趣味横生", "刺绣": "裤脚刺绣别出心裁"},
}  # fmt: skip
# Style -> the advert.
STYLES = {
    "清新": "这{measure}{garment}，{clauses}，清新自然。",
    "复古": "复古风格的{garment}，{clauses}，韵味十足。",
    "简约": "这{measure}{garment}采用简约设计，{clauses}。",
    "休闲": "{garment}，{clauses}，休闲时光的好选择。",
    "甜美": "这{measure}{garment}，{clauses}，尽显甜美气质。",
    "文艺": "文艺青年偏爱的{garment}，{clauses}。",
    "通勤": "通勤路上穿上这{measure}{garment}，{clauses}。",
    "街头": "这{measure}{garment}，{clauses}，穿出街头态度。",
}
# Classes differ in what their adverts speak of first.
DETAIL_ORDER = {
    "裙": ("图案", "版型", "detail"),
    "上衣": ("版型", "detail", "图案"),
    "裤": ("detail", "版型", "图案"),
}
Records = list[dict[str, str]]
_OPTIONAL = ("版型", "图案", "detail")
MAX_RECORDS = 50_000  # about a tenth of the different garments, so that drawing them ends soon


def make_garment(generator: random.Random) -> dict[str, str]:
    """Draws a garment.

    Args:
        generator: source of chance; only `random()` is used, whose sequence Python keeps stable.

    Returns:
        Attribute -> value in the order of a record. Of fit, pattern and detail one or two may be absent.
    """

    def draw(values: Sequence[str]) -> str:
        return values[int(generator.random() * len(values))]

    kind = draw(tuple(CLASSES))
    _, (garment_key, garments), (detail_key, details) = CLASSES[kind]
    garment = draw(tuple(garments))
    present = {name for name in _OPTIONAL if generator.random() < 0.75} or {draw(_OPTIONAL)}
    attributes = {"类型": kind}
    if "版型" in present:
        attributes["版型"] = draw(tuple(FITS[kind]))
    attributes["材质"] = draw(garments[garment].split())
    attributes["颜色"] = draw(COLORS)
    attributes["风格"] = draw(tuple(STYLES))
    if "图案" in present:
        attributes["图案"] = draw(tuple(PATTERNS[kind]))
    attributes[garment_key] = garment
    if "detail" in present:
        attributes[detail_key] = draw(tuple(details))
    return attributes


def describe(attributes: dict[str, str]) -> str:
    """Writes the advert of a garment; the same garment always gets the same one."""
    kind = attributes["类型"]
    measure, (garment_key, _), (detail_key, details) = CLASSES[kind]
    clauses = {
        "版型": FITS[kind].get(attributes.get("版型", "")),
        "图案": PATTERNS[kind].get(attributes.get("图案", "")),
        "detail": details.get(attributes.get(detail_key, "")),
    }
    said = [clauses[name] for name in DETAIL_ORDER[kind] if clauses[name]]
    return STYLES[attributes["风格"]].format(
        measure=measure,
        garment=f"{attributes['颜色']}{attributes['材质']}{attributes[garment_key]}",
        clauses="，".join(said),
    )


def make_records(num_train: int, num_dev: int, seed: int) -> tuple[Records, Records]:
    """Makes distinct records.

    Args:
        num_train: records to train on.
        num_dev: held-out records.
        seed: of the draw.

    Returns:
        Training and held-out records {"content", "summary"}; no content occurs twice.
    """
    generator = random.Random(seed)
    records: dict[str, str] = {}
    while len(records) < num_train + num_dev:
        attributes = make_garment(generator)
        content = "*".join(f"{key}#{value}" for key, value in attributes.items())
        records[content] = describe(attributes)
    rows = [{"content": content, "summary": summary} for content, summary in records.items()]
    return rows[:num_train], rows[num_train:]


def write_records(path: Path, records: Sequence[dict[str, str]]) -> None:
    """Writes JSON lines, UTF-8 with bare line feeds; the file is whole or absent."""
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(text.encode("utf-8"))
    os.replace(temporary, path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Write synthetic records in ADGEN form.")
    parser.add_argument("--output_dir", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--num_train", type=int, default=1200, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--num_dev", type=int, default=60, metavar="N",
                        help="held-out records (default: %(default)s)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    if min(options.num_train, options.num_dev) < 1 or options.num_train + options.num_dev > MAX_RECORDS:
        parser.error(f"--num_train and --num_dev must be positive and at most {MAX_RECORDS} together")
    train, dev = make_records(options.num_train, options.num_dev, options.seed)
    for name, records in (("train.json", train), ("dev.json", dev)):
        try:
            options.output_dir.mkdir(parents=True, exist_ok=True)
            write_records(options.output_dir / name, records)
        except OSError as error:
            parser.error(f"{options.output_dir / name}: cannot be written: {error.strerror}")
        print(f"{len(records)} records written to {options.output_dir / name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
