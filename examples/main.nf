// Proteins into a store and a table:
//
//     nextflow run examples/main.nf --proteins some.faa --model esm2_t6_8M_UR50D
//
// For GPUs add --cluster local-cuda. It may also be the address of a running Dask scheduler, or the
// absolute path of its file. More options of `run` go into --options='--translate six-frame', or, if workers of a
// scheduler have GPUs, --options='--device cuda'. The table needs pip install '.[export]'.
//
// Each attempt at a task begins in an empty folder. So the store is no output: it is named by a
// value, a path that is absolute or a bucket's URL, and a task that was killed goes on from it,
// by itself or by -resume. The output is a summary that is written when the store is complete.
//
// The project's tests do not run Nextflow, only the commands of the processes.

params.proteins = null
params.model = null
params.store = "${launchDir}/embeddings.zarr"
params.outdir = "${launchDir}"
params.cluster = 'local'
params.cores = 4
params.options = ''

process EMBED {
    cpus params.cluster == 'local' ? params.cores : 1
    // Incomplete, interrupted, or killed, as by a queue: another attempt goes on.
    errorStrategy { task.exitStatus in [4, 129, 130, 137, 143] ? 'retry' : 'terminate' }
    maxRetries 3
    publishDir params.outdir, mode: 'copy'

    input:
    path proteins
    val store
    val model
    val options

    output:
    tuple val(store), path('embeddings.json')

    // Code 3: complete, but some rows could not be embedded. The summary lists them.
    script:
    """
    code=0
    virnuc-dask run '${proteins}' '${store}' --model '${model}' ${options} --no-progress \\
        || code=\$?
    [ \$code -eq 0 ] || [ \$code -eq 3 ] || exit \$code
    virnuc-dask status '${store}' --rows --json > embeddings.json || [ \$? -eq 3 ]
    """
}

process TABLE {
    publishDir params.outdir, mode: 'copy'

    input:
    tuple val(store), path(summary)

    output:
    path 'embeddings.parquet'

    script:
    """
    virnuc-dask export '${store}' embeddings.parquet
    """
}

workflow {
    def workers = params.cluster == 'local' ? "--workers ${params.cores}" : ''
    def options = "--cluster '${params.cluster}' ${workers} ${params.options}"
    EMBED(file(params.proteins), params.store, params.model, options)
    TABLE(EMBED.out)
}
