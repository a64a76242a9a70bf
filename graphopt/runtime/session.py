"""ONNX Runtime sessions: what a model takes and gives, running it, and refusals in words."""

from __future__ import annotations

import dataclasses
import enum
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from graphopt.errors import DataError, ModelError
from graphopt.ir.hazards import stopped_after
from graphopt.runtime import marshal, onnxruntime_api, tapping
from graphopt.runtime.specs import Kind, TensorSpec, dtype_name, name_list, parse_runtime_type

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


class OptimizationLevel(enum.Enum):
    """How much ONNX Runtime may rewrite the graph on its own before it runs it."""

    DISABLED = "ORT_DISABLE_ALL"
    BASIC = "ORT_ENABLE_BASIC"
    EXTENDED = "ORT_ENABLE_EXTENDED"
    ALL = "ORT_ENABLE_ALL"


@dataclasses.dataclass(frozen=True)
class SessionOptions:
    """How a session is made, beyond the optimisation level.

    Attributes:
        threads: inside one operator; one thread gives the same bits on every run.
        spinning: idle threads wait awake, which takes the processor from other sessions.
        providers: execution providers in order of preference.
        prepack: let kernels repack constant weights. Packed and unpacked weights may meet different
            GEMM kernels, so a reference is run without.
        in_order: run nodes in the order in which the model lists them. The runtime's own order has what needs no
            input first: weights that nodes decode (DequantizeLinear) would all be in memory at once.
        external_folder: where external data of a model given as bytes lies.
        extra_outputs: names of values of the main graph to return besides the outputs.
        lent: arrays of initializers whose data the model says to be elsewhere, by name; not copied.
        optimized_path: where to write the graph as the runtime will run it, to be read back.
        optimized_weights: name of a file beside it for its weights; None to write them into it.
        signed: run signed bytes as they are, as on ARM; on x86 the runtime makes them unsigned where it can, and leaves
            the rest in float.
        profile: beginning of the path of the runtime's profile; None for no profiling.
        seconds: after which a run is stopped; None for never.
    """

    threads: int = 1
    spinning: bool = True
    providers: tuple[str, ...] = ("CPUExecutionProvider",)
    prepack: bool = True
    in_order: bool = False
    external_folder: Path | None = None
    extra_outputs: tuple[str, ...] = ()
    lent: Mapping[str, np.ndarray[Any, Any]] = dataclasses.field(default_factory=dict)
    signed: bool = False
    optimized_path: Path | None = None
    optimized_weights: str | None = None
    profile: Path | None = None
    seconds: float | None = None


class EndlessError(ModelError):
    """A run was stopped because it took longer than it may."""


class Session:
    """A model that is ready to run in ONNX Runtime.

    Raises:
        ModelError: the runtime refuses the model.
    """

    def __init__(
        self,
        model: Path | bytes,
        *,
        level: OptimizationLevel = OptimizationLevel.DISABLED,
        threads: int = 1,
        providers: tuple[str, ...] = ("CPUExecutionProvider",),
        options: SessionOptions | None = None,
    ) -> None:
        options = options or SessionOptions(threads=threads, providers=providers)
        self.where = f"'{model}'" if isinstance(model, Path) else "the model in memory"
        if options.extra_outputs:
            if isinstance(model, Path):
                options = dataclasses.replace(options, external_folder=model.parent)
            model = tapping.tap(model, options.extra_outputs)
        self._seconds = options.seconds
        self._lent = options.lent  # the runtime reads them where they are
        self._session = _create(model, level, options, self.where)
        self.inputs = tuple(
            [_spec(arg) for arg in self._session.get_inputs()]
            + [_spec(arg, overridable=True) for arg in self._session.get_overridable_initializers()]
        )
        self.outputs = tuple(_spec(arg) for arg in self._session.get_outputs())

    def run(self, feeds: Mapping[str, Any], names: Sequence[str] | None = None) -> dict[str, Any]:
        """Runs the model once; returns the named outputs (all of them by default) in that order.

        Tensors are NumPy arrays (`ml_dtypes` for bfloat16, float8 and sub-byte dtypes, `object` for
        strings), sequences are lists, maps are dicts, an absent optional is None.

        Raises:
            DataError: a feed is missing, unknown, or of the wrong dtype or rank.
            ModelError: the model fails while it runs, or an output cannot be brought to Python.
        """
        wanted = self._wanted(names)
        given = {
            spec.name: self._feed(spec, feeds) for spec in self.inputs if self._is_fed(spec, feeds)
        }
        self._refuse_unknown(feeds)
        exotic = [name for name, spec in wanted.items() if _is_exotic(spec)]
        plain = [name for name in wanted if name not in exotic]
        results = self._run_plain(plain, given) if plain or not exotic else {}
        results |= self._run_exotic(exotic, given) if exotic else {}
        return {name: results[name] for name in wanted}

    def into(
        self, arrays: Mapping[str, np.ndarray[Any, Any]]
    ) -> Callable[[Mapping[str, np.ndarray[Any, Any]]], None]:
        """A function that runs the model once and writes the outputs named into the arrays given.

        Arrays are contiguous and of the outputs' types; feeds are tensors of dtypes that NumPy has itself.
        The function raises DataError as `run`, and ModelError where the model fails while it runs, or an output has
        another shape than its array.
        """
        binding = self._session.io_binding()
        for name, array in arrays.items():
            binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

        def run(feeds: Mapping[str, np.ndarray[Any, Any]]) -> None:
            fed = [spec for spec in self.inputs if self._is_fed(spec, feeds)]
            given = {s.name: np.ascontiguousarray(self._feed(s, feeds)) for s in fed}
            try:
                for name, array in given.items():
                    binding.bind_cpu_input(name, array)
                self._session.run_with_iobinding(binding)
            except onnxruntime_api.errors() as error:
                raise self._failure(error) from error

        return run

    def end_profiling(self) -> Path:
        """The file with the profile, which ends here; only of a session with `SessionOptions.profile`."""
        return Path(self._session.end_profiling())

    def _wanted(self, wanted: Sequence[str] | None) -> dict[str, TensorSpec]:
        known = {spec.name: spec for spec in self.outputs}
        for name in wanted or ():
            if name not in known:
                raise DataError(
                    f"{self.where} has no output '{name}'; its outputs are {name_list(self.outputs)}."
                )
        return known if wanted is None else {name: known[name] for name in wanted}

    def _is_fed(self, spec: TensorSpec, feeds: Mapping[str, Any]) -> bool:
        if spec.name in feeds:
            return True
        if spec.overridable:
            return False
        raise DataError(
            f"No value was given for the input '{spec.name}' ({spec}) of {self.where}; "
            f"it takes {name_list(self.inputs)}."
        )

    def _refuse_unknown(self, feeds: Mapping[str, Any]) -> None:
        known = {spec.name for spec in self.inputs}
        unknown = [name for name in feeds if name not in known]
        if unknown:
            raise DataError(
                f"{self.where} has no input '{unknown[0]}'; it takes {name_list(self.inputs)}."
            )

    def _feed(self, spec: TensorSpec, feeds: Mapping[str, Any]) -> Any:  # noqa: ANN401
        value = feeds[spec.name]
        if value is None and not spec.kind.optional:
            raise DataError(
                f"The input '{spec.name}' of {self.where} is {spec}, not optional: None given."
            )
        if isinstance(value, list):
            return [self._tensor(spec, item) for item in value] if _holds_tensors(spec) else value
        if value is None or isinstance(value, dict):
            return value
        return self._tensor(spec, value)

    def _tensor(self, spec: TensorSpec, value: Any) -> Any:  # noqa: ANN401
        # ONNX Runtime takes 0-d arrays, not NumPy scalars.
        array = np.asarray(value)
        if isinstance(value, dict):
            return value
        self._check_dtype(spec, array)
        return marshal.to_runtime(array, spec.dtype) if spec.dtype in marshal.EXOTIC else array

    def _check_dtype(self, spec: TensorSpec, array: np.ndarray[Any, Any]) -> None:
        if spec.dtype in {ir.DataType.STRING, ir.DataType.UNDEFINED}:
            fits = spec.dtype is ir.DataType.UNDEFINED or array.dtype.kind in "OUST"
        else:
            fits = array.dtype.newbyteorder("=") == spec.dtype.numpy()
        if not fits:
            raise DataError(
                f"The input '{spec.name}' of {self.where} is {spec}; an array of {array.dtype} was given. "
                f"Convert it to {dtype_name(spec.dtype)}."
            )

    def _run_plain(self, wanted: list[str], given: dict[str, Any]) -> dict[str, Any]:
        try:
            with stopped_after(self._seconds) as options:
                values = self._session.run(wanted, given, options)
        except onnxruntime_api.errors() as error:
            raise self._failure(error) from error
        return dict(zip(wanted, values, strict=True))

    def _run_exotic(self, wanted: list[str], given: dict[str, Any]) -> dict[str, Any]:
        ort = onnxruntime_api.runtime()
        try:
            wrapped = {
                name: value
                if isinstance(value, ort.OrtValue)
                else ort.OrtValue.ortvalue_from_numpy(value)
                for name, value in given.items()
            }
            with stopped_after(self._seconds) as options:
                values = self._session.run_with_ort_values(wanted, wrapped, options)
        except onnxruntime_api.errors() as error:
            raise self._failure(error) from error
        return {
            name: marshal.from_runtime(value) for name, value in zip(wanted, values, strict=True)
        }

    def _failure(self, error: Exception) -> DataError | ModelError:
        message = first_line(error)
        if "terminate flag" in str(error):
            return EndlessError(
                f"{self.where} was stopped after {self._seconds:g} seconds: a loop in it does not seem to end. Give "
                "inputs with which it does (--inputs)."
            )
        if "Invalid rank for input" in message or "Got invalid dimensions" in str(error):
            index = re.search(r"index: (\d+) Got: (\S+) Expected: (\S+)", str(error))
            detail = f" (axis {index[1]}: got {index[2]}, expected {index[3]})" if index else ""
            return DataError(f"A feed does not fit {self.where}: {message}{detail}.")
        return ModelError(
            f"{self.where} fails in ONNX Runtime: {message}. Check the model with these inputs."
        )


def first_line(error: BaseException) -> str:
    """What ONNX Runtime says, without its prefix, source locations and later lines.

    A message of 1.31 reads `[ONNXRuntimeError] : 1 : FAIL : Non-zero status code returned while
    running Reshape node. Name:'r' Status Message: /path/file.h:91 Class::Function(args) text`.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = (
        " ".join(lines[:2])
        if lines and len(lines[0]) < 40
        else (lines[0] if lines else repr(error))
    )
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    text = re.sub(r"/\S+?\.(?:h|cc|cpp):\d+ (?:.*\) )?", "", text)
    text = re.sub(r"^Non-zero status code returned while running ", "the run stopped at ", text)
    return _shorten(text.strip().rstrip("."))


def _shorten(text: str, limit: int = 400) -> str:
    return text if len(text) <= limit else text[: limit - 2] + " …"


def _create(
    model: Path | bytes, level: OptimizationLevel, options: SessionOptions, where: str
) -> Any:  # noqa: ANN401
    ort = onnxruntime_api.runtime()
    settings = ort.SessionOptions()
    settings.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level.value)
    settings.intra_op_num_threads = options.threads
    settings.inter_op_num_threads = 1
    # 4 is FATAL: what the runtime would print arrives as an exception. Set per session, never globally.
    settings.log_severity_level = 4
    for key, value in _entries(options).items():
        settings.add_session_config_entry(key, value)
    if options.in_order:
        settings.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    if options.optimized_path is not None:
        settings.optimized_model_filepath = str(options.optimized_path)
    if options.profile is not None:
        settings.enable_profiling = True
        settings.profile_file_prefix = str(options.profile)
    lent = [ort.OrtValue.ortvalue_from_numpy(array) for array in options.lent.values()]
    if lent:
        settings.add_external_initializers(list(options.lent), lent)
    source = str(model) if isinstance(model, Path) else model
    try:
        return ort.InferenceSession(source, settings, providers=list(options.providers))
    except onnxruntime_api.errors() as error:
        raise ModelError(
            f"ONNX Runtime {ort.__version__} refuses {where}: {first_line(error)}. "
            "Check that the file is complete and that its operators, opset and dtypes are ones this runtime has."
        ) from error


def _entries(options: SessionOptions) -> dict[str, str]:
    """What the runtime takes as words."""
    found = {}
    if not options.spinning:
        found["session.intra_op.allow_spinning"] = "0"
    if not options.prepack:
        found["session.disable_prepacking"] = "1"
    if options.signed:
        found["session.qdqisint8allowed"] = "1"
    if options.external_folder is not None:
        folder = str(options.external_folder)
        found["session.model_external_initializers_file_folder_path"] = folder
    if options.optimized_weights is not None:
        key = "session.optimized_model_external_initializers"
        found[f"{key}_file_name"] = options.optimized_weights
        found[f"{key}_min_size_in_bytes"] = "1024"
    return found


def _spec(arg: Any, *, overridable: bool = False) -> TensorSpec:  # noqa: ANN401
    kind, dtype, key = parse_runtime_type(arg.type)
    shape = tuple(arg.shape) if arg.shape is not None else None
    return TensorSpec(arg.name, dtype, shape, kind, key, overridable)


def _is_exotic(spec: TensorSpec) -> bool:
    return spec.kind is Kind.TENSOR and spec.dtype in marshal.EXOTIC


def _holds_tensors(spec: TensorSpec) -> bool:
    return spec.kind in {Kind.SEQUENCE, Kind.OPTIONAL_SEQUENCE}
