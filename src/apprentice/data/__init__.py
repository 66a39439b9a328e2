"""The data pipeline: from task files and datasets to packed rows of token ids. Each step calls only the one before it.

    step        module                             input                     output
    source      sources/locate.Reader              files                     rows by number
    index       index/build                        rows of a source          numbers of the usable rows, frozen with the run
    plan        sampling/plan.Plan                 range of positions        draws: task, template, row, exemplars
    render      encoding/render.Renderer           draws                     texts: instruction, input, answer
    tokenize    encoding/encoder.ExampleEncoder    texts                     token ids within the length limit
    pack        row_columns, packing               token ids of a window     packed rows
    batch       stream                             windows, on Ray Data      blocks of rows, dealt to the training workers

`example_reader` joins render and tokenize, `window` joins plan to pack. `corpus.Corpus` is the data that all steps are made from:
recipe, tasks, indices, plan and prompt format.
"""
