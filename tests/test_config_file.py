import pytest
from pydantic import Field, PositiveInt

from thriftlm.config_file import DOMAIN_NAMES, ConfigFile, space_files
from thriftlm.search.spaces.derived import parse_derived
from thriftlm.search.spaces.domains import DOMAINS
from thriftlm.spec import InputError, RunSpec, Spec


class Inner(Spec):
    depth: PositiveInt = 1
    colour: str = "red"


class Outer(Spec):
    name: str
    inner: Inner = Inner()
    pair: tuple[float, float] = (0.0, 1.0)
    share: float = Field(default=0.5, ge=0, lt=1)


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write_file(text, name="a.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        return name

    return write_file


def refused(path, cls=Outer, overrides=()):
    with pytest.raises(InputError) as error:
        ConfigFile.read(path, overrides).parse(cls)
    return str(error.value)


def test_numbers_in_exponent_notation_are_numbers(write):
    data = ConfigFile.read(write("a: [2e8, 3e-4, 1.62e10, 1.5, -.5e+1, 7, e5, 2e8x]")).data
    assert data["a"] == [2e8, 3e-4, 1.62e10, 1.5, -5.0, 7, "e5", "2e8x"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "name: x\ninner:\n  dept: 3\n",
            "a.yaml:3: inner.dept: unknown key 'dept'; did you mean 'depth'?",
        ),
        (
            "name: x\ninner:\n  depth: three\n",
            "a.yaml:3: inner.depth: must be a whole number, got 'three'",
        ),
        ("name: x\n\ninner: {depth: 0}\n", "a.yaml:3: inner.depth: must be above 0, got 0"),
        ("inner: {depth: 1}\n", "a.yaml: name: required, but not given"),
        ("name: [x]\n", "a.yaml:1: name: must be text, got ['x']"),
        ("name: x\ninner: 4\n", "a.yaml:2: inner: must be a mapping of keys"),
        ("name: x\npair: [1, b]\n", "a.yaml:2: pair[1]: must be a number, got 'b'"),
        ("name: x\nshare: 1\n", "a.yaml:2: share: must be below 1, got 1"),
    ],
)
def test_an_error_names_file_line_key_and_rule(write, text, message):
    assert refused(write(text)) == message


def test_every_problem_has_a_line(write):
    lines = refused(write("name: 1\ninner:\n  depth: x\n  color: red\n")).splitlines()
    assert [line.split(": ")[0] for line in lines] == ["a.yaml:1", "a.yaml:3", "a.yaml:4"]
    assert not any("pydantic" in line for line in lines)


def test_a_rule_over_several_keys_points_at_the_key_it_names(write):
    text = (
        "tokens: 8e5\nmodel:\n  n_layers: 2\n  d_model: 64\n  n_heads: 4\n  n_kv_heads: 3\n"
        "optim: {lr: 1e-3, schedule: wds}\n"
    )
    first, second = refused(write(text), RunSpec).splitlines()
    assert first == (
        "a.yaml:6: model.n_kv_heads: n_kv_heads must divide n_heads: 3 does not divide 4"
    )
    assert second.startswith("a.yaml:7: optim.schedule: must be 'wsd', 'cosine' or 'constant'")
    assert second.endswith("got 'wds'; did you mean 'wsd'?")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a.yaml: must hold a mapping of keys, but is empty"),
        ("- 1\n", "a.yaml: must hold a mapping of keys, but holds a list"),
        ("a: 1\nb: {\n", "a.yaml:3: not valid YAML"),
        ("a:\n\tb: 1\n", "a.yaml:2: not valid YAML"),
        ("a: 1\nb:\n  c: 1\n  c: 2\n", "a.yaml:4: b.c: key given twice, first at a.yaml:3"),
        ("a: &x [*x]\n", "an alias that contains itself"),
        ("1: 2\n", "a.yaml:1: 1: keys must be words, got 1"),
        ("a: !!python/name:os.system\n", "a.yaml:1: not valid YAML"),
    ],
)
def test_what_is_no_mapping_is_refused(write, text, message):
    assert message in refused(write(text))


def test_missing_file_and_folder(write, tmp_path):
    assert refused("none.yaml") == "none.yaml: no such file"
    (tmp_path / "folder").mkdir()
    assert refused("folder") == "folder: is a folder, not a YAML file"


def test_extends_merges_sections_and_replaces_lists_and_domains(write):
    write("name: base\nspace: {lr: {loguniform: [1, 2]}, size: [1, 2], keep: 5}\n", "base.yaml")
    config = ConfigFile.read(write("extends: base.yaml\nspace: {lr: {choice: [3]}, size: [9]}\n"))
    assert config.data == {
        "name": "base",
        "space": {"lr": {"choice": [3]}, "size": [9], "keep": 5},
    }
    assert config.place(("space", "keep")) == "base.yaml:2:"
    assert config.place(("space", "lr")) == "a.yaml:2:"


def test_an_inherited_error_names_the_file_it_came_from(write):
    write("name: base\ninner: {depth: -1}\n", "lib/base.yaml")
    assert refused(write("extends: lib/base.yaml\n")).startswith("lib/base.yaml:2: inner.depth: ")


def test_extends_in_a_circle_or_from_nowhere(write):
    write("extends: a.yaml\n", "b.yaml")
    message = refused(write("extends: b.yaml\n"))
    assert message == "b.yaml:1: extends: goes in a circle: a.yaml -> b.yaml -> a.yaml"
    assert "did you mean 'quickstart'?" in refused(write("extends: quickstar\n", "c.yaml"))


def test_extends_the_name_of_a_shipped_space(write):
    config = ConfigFile.read(write("extends: quickstart\nname: mine\n"))
    assert config.data["name"] == "mine"
    assert config.data["data"]["corpus"] == "python-stdlib"


def test_set_overrides_one_value_and_creates_parents(write):
    path = write("name: x\nspace: {model: {n_layers: 4, d_model: 64}}\n")
    config = ConfigFile.read(path, ["space.model.n_layers=[8, 12]", "new.lr=3e-4", "name=y=z"])
    assert config.data["space"]["model"] == {"n_layers": [8, 12], "d_model": 64}
    assert config.data["new"] == {"lr": 3e-4}
    assert config.data["name"] == "y=z"


def test_an_error_in_an_override_names_the_option(write):
    path = write("name: x\ninner:\n  depth: 2\n")
    message = "--set inner.depth: must be above 0, got 0"
    assert refused(path, overrides=["inner.depth=0"]) == message
    assert "--set name.first=1: name is a value" in refused(path, overrides=["name.first=1"])
    assert "must look like" in refused(path, overrides=["inner.depth"])
    assert "not valid YAML" in refused(path, overrides=["inner.depth=[1"])


def test_domain_names_are_those_of_the_readers():
    derived = {"derive": "a", "ratio": 1.0, "solve": {"params": 1}}
    assert all(parse_derived({name: value}) for name, value in derived.items())
    assert set(DOMAINS) | set(derived) == DOMAIN_NAMES


def test_shipped_spaces_are_found():
    assert "quickstart" in space_files()
