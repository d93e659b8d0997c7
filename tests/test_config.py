"""The configuration: its forms round-trip, and every wrong value is refused with what is allowed."""

import dataclasses
import json

import pytest
from transformers import HfArgumentParser

from hf_actcompress import ActCompressConfig, CompressionArguments, parse_codec

FULL = {
    "codec": "sort:bits=8", "grad_codec": "block:bits=8,round=stochastic", "first": 2, "last": 3, "placement": "cuts",
    "layers": {"blocks.*": "kmeans:bits=2", "head": {"codec": "float8", "grad_codec": "identity"}},
    "blocks": ["net.*", "other"], "stack": "encoder",
    "schedule": {0: "uniform:bits=8", 4: {"grad_codec": "identity"}}, "evaluate": "both",
    "nonfinite": "raise", "seed": 7, "meter_every": 3,
}  # fmt: skip


def test_specs_are_made_canonical():
    config = ActCompressConfig(" block:group=256,bits=4 ", {"name": "uniform", "bits": 3})
    assert config.codec == str(parse_codec("block:bits=4,group=256"))
    assert config.grad_codec == "uniform:bits=3"


def test_every_form_round_trips(tmp_path):
    config = ActCompressConfig(**FULL)
    assert ActCompressConfig.from_dict(config.to_dict()) == config
    assert ActCompressConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    path = config.save_pretrained(tmp_path / "new" / "folder")
    assert path.name == "actcompress_config.json"
    assert ActCompressConfig.from_pretrained(path) == ActCompressConfig.from_pretrained(path.parent) == config
    assert config.to_dict() is not config.to_dict()
    config.to_dict()["layers"].clear()
    assert config.layers


def test_codecs_given_as_objects_are_saved_too(tmp_path):
    codec = parse_codec("block:bits=3")
    config = ActCompressConfig(
        codec, codec, layers={"a": codec, "b": {"codec": codec, "grad_codec": codec}}, schedule={0: codec}
    )
    again = ActCompressConfig.from_pretrained(config.save_pretrained(tmp_path))
    assert again == config
    assert again.codecs_of(again.layers["a"])[0] == again.codecs_of(again.layers["b"])[1] == codec
    assert again.scheduled(0)[0] == codec


def test_the_schedule_is_sorted_and_its_latest_entry_counts():
    config = ActCompressConfig("identity", schedule={"4": "uniform:bits=4", 2: "uniform:bits=2"})
    assert list(config.schedule) == [2, 4]
    assert [str(config.scheduled(epoch)[0]) for epoch in range(6)] == ["identity"] * 2 + ["uniform:bits=2"] * 2 + [
        "uniform:bits=4"
    ] * 2


@pytest.mark.parametrize(("grad_codec", "value", "expected"), [
    (None, None, ("block:bits=4", "block:bits=4")),
    ("identity", None, ("block:bits=4", "identity")),
    (None, "uniform:bits=2", ("uniform:bits=2", "uniform:bits=2")),
    ("identity", "uniform:bits=2", ("uniform:bits=2", "identity")),
    (None, {"codec": "uniform:bits=2"}, ("uniform:bits=2", "uniform:bits=2")),
    (None, {"grad_codec": "identity"}, ("block:bits=4", "identity")),
    ("identity", {"codec": "uniform:bits=2", "grad_codec": "float8"}, ("uniform:bits=2", "float8")),
    ("identity", {"codec": "uniform:bits=2", "grad_codec": None}, ("uniform:bits=2", "uniform:bits=2")),
    (None, {"name": "uniform", "bits": 2}, ("uniform:bits=2", "uniform:bits=2")),
])  # fmt: skip
def test_which_codec_serves_which_direction(grad_codec, value, expected):
    config = ActCompressConfig("block:bits=4", grad_codec)
    assert config.codecs_of(value) == tuple(map(parse_codec, expected))


@pytest.mark.parametrize(("values", "message"), [
    ({"codec": "blok:bits=4"}, r"codec: Unknown codec 'blok'.*Did you mean 'block'\?"),
    ({"codec": "block:bits=40"}, r"codec: block: bits=40 is not an integer from 1 to"),
    ({"codec": "block:bit=4"}, r"codec: block has no option 'bit'.*Did you mean 'bits'\?"),
    ({"codec": ""}, r"codec: A codec is a spec such as 'block:bits=4'"),
    ({"codec": 4}, r"codec: A codec is a spec such as 'block:bits=4'.*got 4"),
    ({"grad_codec": "none"}, r"grad_codec: There is no codec 'none': write identity .* leave the option"),
    ({"codec": " None"}, r"codec: There is no codec 'None': write identity for tensors that stay"),
    ({"saved": "none"}, r"saved: There is no codec 'none'"),
    ({"layers": {"a": "auto:ratio=8"}}, r"layers\['a'\]: There is no codec 'auto': codec='auto:ratio=8' and"),
    ({"layers": {3: "block"}}, r"layers: the key 3 is not the name of a layer, or a glob"),
    ({"blocks": [3]}, r"blocks=\[3\] is not a list of module paths or globs, such as \['encoder"),
    ({"blocks": []}, r"blocks=\[\] is not a list of module paths .* Leave it out to have the blocks found"),
    ({"blocks": {"a": 1}}, r"blocks=\{'a': 1\} is not a list"),
    ({"blocks": [" "]}, r"blocks=\[' '\] is not a list"),
    ({"first": -1}, r"first=-1 is not a whole number of 0 or more"),
    ({"first": "1"}, r"first='1' is not a whole number of 0 or more"),
    ({"last": 1.5}, r"last=1\.5 is not a whole number"),
    ({"last": True}, r"last=True is not a whole number"),
    ({"meter_every": -5}, r"meter_every=-5 is not a whole number"),
    ({"seed": "x"}, r"seed='x' is not a whole number"),
    ({"seed": 0.5}, r"seed=0\.5 is not a whole number"),
    ({"placement": "all"}, r"placement='all' is not known; choose one of: every, cuts"),
    ({"evaluate": "yes"}, r"evaluate='yes' is not known; choose one of: on, off, both"),
    ({"nonfinite": "warn"}, r"nonfinite='warn' is not known; choose one of: pass, raise"),
    ({"layers": ["a"]}, r"layers=\['a'\] is not a mapping of glob to codec"),
    ({"layers": {"a": "blok"}}, r"layers\['a'\]: Unknown codec 'blok'"),
    ({"layers": {"a": {"forward": "block"}}}, r"layers\['a'\]: unknown entries \['forward'\]; use 'codec' and"),
    ({"layers": {"a": {"codec": "block", "grad_codec": "x"}}}, r"layers\['a'\]: Unknown codec 'x'"),
    ({"schedule": "sort"}, r"schedule='sort' is not a mapping of epoch to codec: \{0: 'sort:bits=8'\}"),
    ({"schedule": {-1: "sort"}}, r"schedule: the key -1 is not an epoch \(a whole number of 0 or more\)"),
    ({"schedule": {0.5: "sort"}}, r"the key 0\.5 is not an epoch"),
    ({"schedule": {"first": "sort"}}, r"the key 'first' is not an epoch"),
    ({"schedule": {True: "sort"}}, r"the key True is not an epoch"),
    ({"schedule": {3: "sort:bits=99"}}, r"schedule\[3\]: sort: bits=99"),
])  # fmt: skip
def test_wrong_values_are_refused_with_a_remedy(values, message):
    with pytest.raises(ValueError, match=message):
        ActCompressConfig(**values)


@pytest.mark.parametrize("values", [{}, {"seed": 3}, {"nonfinite": "raise"}, {"analysis": True}])
def test_nothing_to_compress_is_an_error_that_says_what_each_site_does(values):
    with pytest.raises(ValueError, match=r"Nothing is to be compressed\. codec=.*boundaries.*saved=.*less memory"):
        ActCompressConfig(**values)


def test_saved_alone_is_saved_alone():
    config = ActCompressConfig(saved="block:bits=4")
    assert (config.codec, config.first, config.last, config.boundaries) == (None, 0, 0, False)
    assert ActCompressConfig.from_dict(config.to_dict()) == config
    both = ActCompressConfig("sort:bits=8", saved="block:bits=4")
    assert (both.first, both.last, both.boundaries) == (1, 1, True)
    # What version 0.1 wrote into its checkpoints.
    assert not ActCompressConfig("block:bits=4", first=0, last=0, saved="block:bits=4").boundaries


def test_an_option_of_boundaries_means_boundaries():
    for values in ({"first": 2}, {"layers": {"a": "block"}}, {"evaluate": "both"}, {"grad_codec": "identity"}):
        config = ActCompressConfig(**values)
        assert (config.codec, config.boundaries) == ("block:bits=4", True)


@pytest.mark.parametrize(("values", "message"), [
    ({"saved": "block", "first": 1}, r"first=1 belongs to layer boundaries, and with saved='block' alone"),
    ({"saved": "block", "evaluate": "off"}, r"evaluate='off' belongs to layer boundaries"),
    ({"saved": "block", "layers": {"a": "block"}}, r"layers=.* belongs to layer boundaries"),
    ({"codec": "block", "first": 0, "last": 0, "saved": "block", "schedule": {1: "sort"}}, r"schedule=.* belongs to"),
    ({"codec": "block", "first": 0, "last": 0}, r"first=0 and last=0 leave no layer boundary"),
    ({"first": 0, "last": 0}, r"first=0 and last=0 leave no layer boundary"),
    ({"codec": "block", "keep_freed_memory": 1}, r"keep_freed_memory=1 is neither True nor False"),
    ({"codec": "block", "stack": "middle"}, r"stack='middle' is not known; choose one of: encoder, decoder"),
    ({"saved": "ef+block"}, r"saved='ef\+block:bits=4': "),
    ({"saved": "delta+block"}, r"saved='delta\+block:bits=4': "),
    ({"codec": "auto:ratio=8", "schedule": {1: "block"}}, r"decides by itself when codecs change; leave schedule="),
    ({"codec": "block", "resolved": {"a": {"forward": "block"}}}, r"resolved= belongs to codec='auto:\.\.\.'"),
    ({"codec": "auto:ratio=8", "resolved": {"a": {"forward": "block"}}}, r"resolved\['a'\]=.* name a codec for"),
    ({"codec": "auto:ratio=8", "resolved": {"a": {"forward": "block", "backward": "blok"}}}, r"resolved\['a'\]\['ba"),
    ({"codec": "auto:ratio=8", "resolved": {"a": "block"}}, r"resolved\['a'\]='block' has to name"),
    ({"codec": "auto:ratio=8", "grad_codec": "auto:ratio=8"}, r"auto chooses both directions"),
])  # fmt: skip
def test_conflicts_are_errors(values, message):
    with pytest.raises(ValueError, match=message):
        ActCompressConfig(**values)


def test_a_file_that_is_not_a_configuration(tmp_path):
    path = tmp_path / "actcompress_config.json"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"is not JSON \(.*\)\. Write it"):
        ActCompressConfig.from_pretrained(tmp_path)
    path.write_text("[1]")
    with pytest.raises(ValueError, match=r"holds a list, where a mapping"):
        ActCompressConfig.from_pretrained(tmp_path)


def test_unknown_entries_are_refused():
    with pytest.raises(ValueError, match=r"Unknown configuration entries \['codecs'\]; known are: codec, grad_"):
        ActCompressConfig.from_dict({"codecs": "block"})
    for values in ([1], [[1]], None, 3, "block"):
        with pytest.raises(ValueError, match=r"A configuration is a dict such as \{'codec': .*; got "):
            ActCompressConfig.from_dict(values)


def test_an_empty_codec_is_not_the_default():
    for codec, message in (("", "A codec is a spec"), (0, "A codec is a spec"), ({}, "ActCompressConfig.from_dict")):
        with pytest.raises(ValueError, match=message):
            ActCompressConfig.of(codec)
    assert ActCompressConfig.of(None) == ActCompressConfig("block:bits=4")


def test_a_folder_without_a_configuration(tmp_path):
    with pytest.raises(ValueError, match=r"There is no actcompress_config\.json at .*save_pretrained\(folder\)"):
        ActCompressConfig.from_pretrained(tmp_path)


# The command line


def parsed(*argv):
    (arguments,) = HfArgumentParser(CompressionArguments).parse_args_into_dataclasses(list(argv))
    return arguments.to_config()


def test_no_option_means_the_default_of_the_script():
    (arguments,) = HfArgumentParser(CompressionArguments).parse_args_into_dataclasses([])
    assert arguments.to_config("block:bits=4") == ActCompressConfig("block:bits=4")
    with pytest.raises(ValueError, match=r"Nothing is to be compressed\. --codec 'block:bits=4' compresses the act"):
        arguments.to_config()


def test_saved_alone_on_the_command_line():
    assert parsed("--saved", "block:bits=4") == ActCompressConfig(saved="block:bits=4")
    assert parsed("--codec", "none", "--saved", "block:bits=4") == ActCompressConfig(saved="block:bits=4")


def test_options_are_made_from_the_fields():
    ours = {f.name: f for f in dataclasses.fields(ActCompressConfig)}
    theirs = {f.name: f for f in dataclasses.fields(CompressionArguments)}
    assert set(ours) - set(theirs) == {"seed", "resolved"}
    assert set(theirs) - set(ours) == {"codec_seed"}
    for name in set(ours) & set(theirs):
        assert theirs[name].metadata["help"] == ours[name].metadata["help"]
        assert theirs[name].default == ours[name].default
    assert all(f.metadata["help"].endswith((".", ").")) for f in ours.values())


@pytest.mark.parametrize(("argv", "message"), [
    (("--first", "-1"), "--first -1 is not a whole number"),
    (("--codec_seed", "-1"), "--codec_seed -1 is not a whole number"),
    (("--codec", "blok"), "--codec: Unknown codec 'blok'"),
    (("--layers", '{"a": "blok"}'), r"--layers\['a'\]: Unknown codec"),
    (("--grad_codec", "none"), r"--grad_codec: There is no codec 'none'"),
    (("--saved", "block", "--first", "2"), "--first 2 belongs to layer boundaries, and with --saved 'block'"),
    (("--codec", "auto:ratio=8", "--schedule", '{"1": "block"}'), "--codec 'auto:ratio=8' decides.*leave --schedule"),
])  # fmt: skip
def test_errors_name_options_as_they_are_typed(argv, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        parsed(*argv)


def test_every_option_reaches_the_configuration():
    config = parsed(
        "--codec", "sort:bits=8", "--grad_codec", "block:bits=8,round=stochastic", "--first", "2", "--last", "3",
        "--placement", "cuts", "--layers", json.dumps(FULL["layers"]), "--blocks", "net.*", "other",
        "--stack", "encoder",
        "--schedule", json.dumps(FULL["schedule"]), "--evaluate", "both", "--nonfinite", "raise",
        "--codec_seed", "7", "--meter_every", "3",
    )  # fmt: skip
    assert config == ActCompressConfig(**FULL)


@pytest.mark.parametrize("text", ["none", "None", " none "])
def test_none_runs_without_compression(text):
    assert parsed("--codec", text) is None


@pytest.mark.parametrize("option", ["layers", "schedule"])
def test_options_that_are_not_json(option):
    with pytest.raises(ValueError, match=rf"--{option} '0: sort' is not a mapping.*nor JSON of one \(.*\)"):
        parsed(f"--{option}", "0: sort")


def test_json_of_another_shape():
    with pytest.raises(ValueError, match=r"--schedule \['sort'\] is not a mapping"):
        parsed("--schedule", '["sort"]')


def test_a_json_file_may_nest_layers_and_schedule():
    values = {"layers": FULL["layers"], "schedule": {"1": "sort"}}
    (arguments,) = HfArgumentParser(CompressionArguments).parse_dict(values)
    assert arguments.to_config() == ActCompressConfig(layers=FULL["layers"], schedule={1: "sort"})
