"""Writes the sample records of configs/tiny/sample, with the same bytes each time.

    python tools/make_sample_data.py --output_dir configs/tiny/sample

The records have the form of ADGEN (attributes of a garment -> advert) without its texts: garments are drawn from
the tables below, and the attributes decide about the advert. One or two attributes decide about each clause, so
that a model of two layers can learn the rule and apply it to new garments.

Two further tasks are for adapters and dialogues: short titles in place of adverts, and conversations with a shop in
which the assistant queries the stock with a tool.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also runs where nothing is installed

from glm_ms.program import program
from glm_ms.storage.arguments import Parser
from glm_ms.storage.atomic import replace_text
from glm_ms.storage.errors import WriteError

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
# Order of the clauses in the adverts of each class.
DETAIL_ORDER = {
    "裙": ("图案", "版型", "detail"),
    "上衣": ("版型", "detail", "图案"),
    "裤": ("detail", "版型", "图案"),
}
Record = dict[str, Any]
Records = list[Record]
_OPTIONAL = ("版型", "图案", "detail")
MAX_RECORDS = 50_000  # about a tenth of the different garments, so that drawing them ends soon
NUM_TITLES, NUM_CONVERSATIONS = (400, 40), (120, 16)  # to train on, held out
STOCK_TOOL = {
    "name": "stock",
    "description": "pieces left",
    "parameters": {"garment": {"type": "string"}, "color": {"type": "string"}},
}


def make_garment(generator: random.Random) -> dict[str, str]:
    """Draws a garment.

    Args:
        generator: random numbers; only `random()` is used, whose sequence is the same in all versions of Python.

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
    """The advert of a garment, a function of its attributes."""
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


def title(attributes: dict[str, str]) -> str:
    """The title of a garment: its attributes in a fixed order."""
    _, (garment_key, _), (detail_key, _) = CLASSES[attributes["类型"]]
    extras = "，".join(attributes[key] for key in (detail_key, "图案") if key in attributes)
    name = f"{attributes['风格']}{attributes.get('版型', '')}{attributes['颜色']}{attributes['材质']}"
    return f"{name}{attributes[garment_key]}{f'，{extras}' if extras else ''}"


def make_conversation(generator: random.Random) -> Record:
    """A customer asks for a garment in some color; the assistant queries the stock, answers, and writes the advert.

    One in three conversations has a system message in place of tools, and an answer without loss.

    Returns:
        {"tools", "conversations"}, the latter messages of the roles system, user, assistant and tool.
    """
    attributes = make_garment(generator)
    measure, (garment_key, _), _ = CLASSES[attributes["类型"]]
    garment, color = attributes[garment_key], attributes["颜色"]
    wish = {"role": "user", "content": "*".join(f"{key}#{value}" for key, value in attributes.items())}
    advert = {"role": "assistant", "content": describe(attributes)}
    if generator.random() < 1 / 3:
        messages = [
            {"role": "system", "content": "为服装写文案。"},
            wish,
            {**advert, "loss": False},
            {"role": "user", "content": "短一点。"},
            {"role": "assistant", "content": title(attributes)},
        ]
        return {"conversations": messages}
    pieces = int(generator.random() * 10)
    answer = f"有{pieces}{measure}{color}{garment}。" if pieces else f"{color}{garment}都卖完了。"
    messages = [
        {"role": "user", "content": f"有{color}{garment}吗？"},
        {"role": "assistant", "content": "看一下。"},
        {"role": "tool", "name": "stock", "parameters": {"garment": garment, "color": color},
         "observation": {"pieces": pieces}},
        {"role": "assistant", "content": answer},
        wish,
        advert,
    ]  # fmt: skip
    return {"tools": [STOCK_TOOL], "conversations": messages}


def make_records(
    number: int, generator: random.Random, write: Callable[[dict[str, str]], str], known: Collection[str] = ()
) -> Records:
    """Makes distinct records.

    Args:
        number: of records.
        generator: random numbers.
        write: attributes of a garment to text.
        known: contents that may not occur.

    Returns:
        Records {"content", "summary"}; no content occurs twice.
    """
    records: dict[str, str] = {}
    while len(records) < number:
        attributes = make_garment(generator)
        content = "*".join(f"{key}#{value}" for key, value in attributes.items())
        if content not in known:
            records[content] = write(attributes)
    return [{"content": content, "summary": summary} for content, summary in records.items()]


def make_sample(num_train: int, num_dev: int, seed: int) -> dict[str, Records]:
    """Makes every file of the sample.

    Args:
        num_train: adverts to train on.
        num_dev: held-out adverts.
        seed: of all draws.

    Returns:
        File name -> records. No content of adverts and titles occurs twice in all files together.
    """
    generator = random.Random(seed)
    adverts = make_records(num_train + num_dev, generator, describe)
    known = {record["content"] for record in adverts}
    titles = make_records(sum(NUM_TITLES), generator, title, known)
    talks = [make_conversation(generator) for _ in range(sum(NUM_CONVERSATIONS))]
    files = {}
    for name, records, train in (
        ("", adverts, num_train),
        ("titles_", titles, NUM_TITLES[0]),
        ("conversations_", talks, NUM_CONVERSATIONS[0]),
    ):
        files[f"{name}train.json"], files[f"{name}dev.json"] = records[:train], records[train:]
    return files


def write_records(path: Path, records: Sequence[Record]) -> None:
    """Writes JSON lines, UTF-8 with bare line feeds; the file is whole or absent."""
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    replace_text(path, text, parents=True)


@program
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = Parser(description="Write synthetic records: adverts and titles in ADGEN form, conversations with a tool.")
    parser.add_argument("--output_dir", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--num_train", type=int, default=1200, metavar="N",
                        help="adverts to train on (default: %(default)s)")  # fmt: skip
    parser.add_argument("--num_dev", type=int, default=60, metavar="N",
                        help="held-out adverts (default: %(default)s)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    if min(options.num_train, options.num_dev) < 1 or options.num_train + options.num_dev > MAX_RECORDS:
        parser.error(f"--num_train and --num_dev must be positive and at most {MAX_RECORDS} together")
    for name, records in make_sample(options.num_train, options.num_dev, options.seed).items():
        try:
            write_records(options.output_dir / name, records)
        except WriteError as error:
            parser.error(str(error))
        print(f"{len(records)} records written to {options.output_dir / name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
