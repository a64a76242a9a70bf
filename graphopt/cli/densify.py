"""`graphopt densify`."""

from __future__ import annotations

from graphopt.cli import options
from graphopt.cli.optimizing import External, Output


def command(
    model: options.Model,
    output: Output,
    external: External = "auto",
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> int:
    """Write MODEL with every sparse weight dense, for tools that cannot read sparse ones.

    Nothing else changes: the same operators, names and numbers, to the bit.
    """
    from graphopt.cli.choice import one_of
    from graphopt.cli.optimizing import EXTERNAL
    from graphopt.driver.result import check_output
    from graphopt.emit.sparse import densify
    from graphopt.ir.model_file import ExternalData, load_model, save_model
    from graphopt.ir.sparse import CooTensor
    from graphopt.report.facts import stored_tensors

    one_of("place for weights", external, EXTERNAL)
    check_output(output)
    source = load_model(model)
    sparse = sum(isinstance(tensor, CooTensor) for _, tensor in stored_tensors(source))
    files = save_model(densify(source), output, external=ExternalData(external))
    size = sum(file.stat().st_size for file in files)
    facts = {"input": str(model), "output": str(output), "sparse_tensors": sparse, "bytes": size}
    if as_json:
        from graphopt.cli.console import show_json

        show_json(facts)
    elif not quiet:
        from graphopt.cli.console import show, text

        show(text(f"{model} → {output}: {sparse} sparse tensors made dense, {size} bytes"))
    return 0
