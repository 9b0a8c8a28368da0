# Proteins into FOLDER/embeddings.zarr, whose summary is the last line of the output:
#
#     mkdir stores
#     cwltool examples/embed.cwl --proteins some.faa --folder stores --model /data/esm2_t6_8M.pt
#
# The outputs of a killed job are lost. So the store is no output: it lies in a folder that is an
# input and is changed in place, and the same command goes on from it.
#
# For GPUs add --cluster local-cuda; --workers is then their number. For a running Dask scheduler, of
# which --cluster is the address, remove the input `workers` and the ResourceRequirement.
#
# A job has a HOME of its own. Give --model a path, or the weights are downloaded each time.
cwlVersion: v1.2
class: CommandLineTool
baseCommand: [virnuc-dask, run, --json]
requirements:
  InitialWorkDirRequirement:
    listing:
      - {entry: $(inputs.folder), writable: true}
  InplaceUpdateRequirement:
    inplaceUpdate: true
  ResourceRequirement:
    coresMin: $(inputs.workers)
inputs:
  proteins: {type: File, inputBinding: {position: 1}}
  folder: Directory
  model: {type: string, inputBinding: {prefix: --model}}
  workers: {type: int, default: 1, inputBinding: {prefix: --workers}}
  cluster: {type: "string?", inputBinding: {prefix: --cluster}}
  device: {type: "string?", inputBinding: {prefix: --device}}
  translate: {type: "string?", inputBinding: {prefix: --translate}}
  rows_per_chunk: {type: "int?", inputBinding: {prefix: --rows-per-chunk}}
arguments:
  - {position: 2, valueFrom: $(inputs.folder.basename)/embeddings.zarr}
stdout: events.jsonl
outputs:
  events: stdout
# 3: complete, but some rows could not be embedded.
successCodes: [0, 3]
permanentFailCodes: [2]
# The same command goes on.
temporaryFailCodes: [4, 129, 130, 137, 143]
