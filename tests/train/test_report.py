"""The page of a run: every table's figures in their places, what is written there escaped, nothing fetched."""

from html.parser import HTMLParser

from PIL import Image

from llava_jax.train import report


class Page(HTMLParser):
    """The cells of each table, row by row, under the title before it; the chats; and what the page would load."""

    def __init__(self, text: str):
        super().__init__()
        self.tables, self.chats, self.loaded, self.tag, self.title, self.language = {}, [], [], "", "", ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tag, attributes = tag, dict(attrs)
        self.language = attributes.get("lang", self.language)
        if attributes.get("class") in ("question", "answer"):
            self.tag = attributes["class"]
        self.loaded += [value for name, value in attrs if name in ("src", "href")]
        if tag == "table":
            self.tables[self.title] = []
        elif tag == "tr":
            self.tables[self.title].append([])

    def handle_data(self, data):
        if self.tag == "h2":
            self.title = data
        elif self.tag in ("question", "answer"):
            self.chats.append((self.language, self.tag, data))
        elif self.tag in ("td", "th"):
            self.tables[self.title][-1].append(data)

    def handle_endtag(self, tag):
        self.tag = ""


def test_the_tables_of_a_page(tmp_path):
    tables = {"Right <answers>": {"trained": {"all": 0.936, "colour": 0.9}, "blind": {"all": 0.237}},
              "Probes": {"English": {"left/right": 1.0}, "guessing": {"left/right": 0.5}}}
    stages = {"align": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "validation_loss": 1.5}]}
    report.write_page(tmp_path / "page.html", "Title", "What <it> is", stages, tables,
                      [(Image.new("RGB", (4, 4)), [("<Which>?", "red", "blue", False)])],
                      [report.Chat(Image.new("RGB", (9, 9)), "ko", [("<뭐>?", "네."), ("몇 개?", "2")])])
    text = (tmp_path / "page.html").read_text()
    page = Page(text)
    assert page.tables == {
        "Right <answers>": [["trained", "blind"], ["all", "93.6 %", "23.7 %"], ["colour", "90.0 %", "–"]],
        "Probes": [["English", "guessing"], ["left/right", "100.0 %", "50.0 %"]],
    }
    assert "<Which>" not in text and "<it>" not in text and "<뭐>" not in text
    assert page.chats == [("ko", "question", "<뭐>?"), ("ko", "answer", "네."),
                          ("ko", "question", "몇 개?"), ("ko", "answer", "2")]
    assert len(page.loaded) == 2 and all(value.startswith("data:image/png;base64,") for value in page.loaded)
