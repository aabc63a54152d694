from __future__ import annotations

import sys
import textwrap
import types
from abc import ABC, abstractmethod

import pytest

from qratk import registry as registry_module
from qratk.components import REGISTRIES
from qratk.core.errors import ConfigurationError, DuplicateComponentError, PluginError, UnknownComponentError
from qratk.registry import REQUIRED, Registry
from qratk.repairs.base import RepairPolicy, repairs


class Strategy(ABC):
    @abstractmethod
    def act(self) -> int: ...


class Plain(Strategy):
    def __init__(self, size: int, colour: str = "red") -> None:
        self.size, self.colour = size, colour

    def act(self) -> int:
        return self.size


class Other(Plain):
    pass


@pytest.fixture
def kind():
    """A registry over the real folder of repairs, so that its scan finds real modules."""
    return Registry("repairs", "RepairPolicy")


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Install packages that announce entry points, as `pip` would, in a folder on the path."""

    def add(package: str, points: dict[str, str], modules: dict[str, str] | None = None) -> None:
        info = tmp_path / f"{package.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        lines = "".join(f"{name} = {value}\n" for name, value in points.items())
        (info / "entry_points.txt").write_text(f"[qratk.repairs]\n{lines}")
        for module, source in (modules or {}).items():
            (tmp_path / f"{module}.py").write_text(textwrap.dedent(source))
            monkeypatch.delitem(sys.modules, module, raising=False)

    monkeypatch.syspath_prepend(str(tmp_path))
    return add


SOUND = """
    from qratk.repairs.base import RepairPolicy

    class Mend(RepairPolicy):
        def __init__(self, strength: int = 3):
            self.strength = strength

        def repair(self, problem, configuration):
            return problem.space.smallest

    class Unfinished(RepairPolicy):
        pass

    NUMBER = 5
"""


def test_helper_modules_with_an_underscore_are_not_imported_to_list_names(tmp_path, monkeypatch):
    package = types.ModuleType("qratk.things")
    package.__path__ = [str(tmp_path)]
    monkeypatch.setitem(sys.modules, "qratk.things", package)
    (tmp_path / "_heavy.py").write_text("raise RuntimeError('loaded')")
    (tmp_path / "light.py").write_text(
        "from qratk.things import registry\nregistry.register('light')(type('Light', (), {}))"
    )
    package.registry = Registry("things", "Thing")
    assert package.registry.names() == ("light",)


def test_name_registered_twice_names_both_owners(kind):
    kind.register("mine")(Plain)
    with pytest.raises(DuplicateComponentError, match=r"'mine'.*test_registry\.Plain.*test_registry\.Other"):
        kind.register("mine")(Other)


def test_same_class_may_be_registered_again(kind):
    kind.register("mine")(Plain)
    kind.register("mine")(Plain)
    assert kind.get("mine") is Plain


def test_unknown_name_lists_the_known_and_the_nearest():
    with pytest.raises(UnknownComponentError, match=r"unknown name 'gredy'; known are fill_ranks, greedy, ") as caught:
        repairs.get("gredy")
    assert ", ".join(repairs.names()) in str(caught.value)
    assert "Did you mean 'greedy'?" in str(caught.value)


def test_unlike_name_gets_no_suggestion():
    with pytest.raises(UnknownComponentError) as caught:
        repairs.get("zzz")
    assert "Did you mean" not in str(caught.value)


def test_unknown_option_lists_the_options_and_the_nearest():
    with pytest.raises(ConfigurationError, match=r"no option 'epsilo'; its options are \['epsilon'\]") as caught:
        repairs.create("greedy", epsilo=0.1)
    assert "Did you mean 'epsilon'?" in str(caught.value)


def test_component_without_options_says_so():
    with pytest.raises(ConfigurationError, match="its options are none"):
        repairs.create("reject", epsilon=0.1)


def test_missing_option_is_named(kind):
    kind.register("mine")(Plain)
    with pytest.raises(ConfigurationError, match=r"needs a value for \['size'\]"):
        kind.create("mine")
    assert kind.create("mine", size=4).act() == 4


def test_options_are_those_of_the_constructor(kind):
    kind.register("mine")(Plain)
    size, colour = kind.options("mine")
    assert (size.name, size.annotation, size.default) == ("size", "int", REQUIRED)
    assert (colour.name, colour.annotation, colour.default) == ("colour", "str", "red")


def test_class_knows_its_registered_name():
    assert repairs.get("greedy").component_name == "greedy"


def test_plugin_is_found_by_its_entry_point(kind, install):
    install("nice-plugin", {"mend": "nice_plugin:Mend"}, {"nice_plugin": SOUND})
    assert "mend" in kind.names()
    assert "nice_plugin" not in sys.modules, "names must import no plugin"
    mend = kind.create("mend", strength=7)
    assert isinstance(mend, RepairPolicy)
    assert mend.strength == 7
    assert kind.owner("mend") == "nice-plugin"
    assert kind.owner("greedy") == "qratk"
    assert kind.class_path("mend") == "nice_plugin.Mend"


def test_plugin_option_is_checked(kind, install):
    install("nice-plugin", {"mend": "nice_plugin:Mend"}, {"nice_plugin": SOUND})
    with pytest.raises(ConfigurationError, match=r"no option 'strenth'.*Did you mean 'strength'"):
        kind.create("mend", strenth=7)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import a_module_that_does_not_exist", "ModuleNotFoundError"),
        ("class Mend(:", "SyntaxError"),
        ("raise RuntimeError('no licence')", "no licence"),
        ("x = 1", "AttributeError"),
    ],
)
def test_broken_plugin_names_its_package_and_the_reason(kind, install, source, reason):
    install("bad-plugin", {"broken": "bad_plugin:Mend"}, {"bad_plugin": source})
    assert "broken" in kind.names()
    with pytest.raises(PluginError, match="package bad-plugin") as caught:
        kind.get("broken")
    assert reason in str(caught.value)


def test_broken_plugin_does_not_hinder_the_others(kind, install):
    install("bad-plugin", {"broken": "bad_plugin:Mend"}, {"bad_plugin": "raise RuntimeError"})
    kind.register("mine")(Plain)
    assert kind.create("mine", size=2).act() == 2


@pytest.mark.parametrize("target", ["Unfinished", "NUMBER"])
def test_plugin_that_is_no_concrete_subclass_is_refused(kind, install, target):
    install("odd-plugin", {"odd": f"odd_plugin:{target}"}, {"odd_plugin": SOUND})
    with pytest.raises(PluginError, match=r"odd-plugin.*no concrete subclass of RepairPolicy"):
        kind.get("odd")


def test_two_plugins_with_one_name_are_both_named(kind, install):
    install("plugin-a", {"mend": "plugin_a:Mend"})
    install("plugin-b", {"mend": "plugin_b:Mend"})
    with pytest.raises(DuplicateComponentError, match=r"plugin-[ab].*plugin-[ab]"):
        kind.names()


def test_plugin_may_not_take_a_name_of_ours(install):
    ours = repairs.get("greedy")  # before there is the other one, which this registry would find too
    install("greedy-plugin", {"greedy": "greedy_plugin:Mend"})
    fresh: Registry = Registry("repairs", "RepairPolicy")
    fresh.register("greedy")(ours)
    with pytest.raises(DuplicateComponentError, match=r"qratk's own .*GreedyDowngrade.*greedy-plugin"):
        fresh.names()


def test_entry_points_are_read_once(kind, monkeypatch):
    calls = []
    monkeypatch.setattr(registry_module, "entry_points", lambda group: calls.append(group) or ())
    kind.names()
    kind.names()
    assert calls == ["qratk.repairs"]


@pytest.mark.parametrize("kind_name", sorted(REGISTRIES))
def test_every_component_is_a_documented_concrete_subclass(kind_name):
    registry = REGISTRIES[kind_name]
    assert registry.names()
    for name in registry:
        cls = registry.get(name)
        assert registry.base in {base.__name__ for base in cls.__mro__}
        assert not getattr(cls, "__abstractmethods__", None)
        assert cls.__doc__
        for option in registry.options(name):
            assert option.annotation, f"{kind_name} {name}: option {option.name} has no annotation"
