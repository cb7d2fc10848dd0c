# From items to cubes: masks, shifts, one composite per period and tile.
if building("scenes"):

    rule verify_items:
        input:
            lock="results/scenes/items.json",
        output:
            "results/scenes/verified.json",
        log:
            "logs/verify_items.log",
        benchmark:
            "benchmarks/verify_items.tsv"
        threads: 1
        resources:
            mem_mb=mem_mb(1000),
            runtime=minutes(60),
        params:
            config=keys("aoi", "scenes.on_bad_item", "scenes.max_failed_pct"),
            code=code_digest("acquire.assets", "preprocess.radiometry"),
        message:
            "Check every asset against its record"
        shell:
            "terraloom verify-items --campaign work/campaign.yaml > {log} 2>&1"

    rule mask_scenes:
        input:
            lock="results/scenes/items.json",
            verified="results/scenes/verified.json",
        output:
            "results/scenes/masks/{part}.json",
        log:
            "logs/mask_scenes/{part}.log",
        benchmark:
            "benchmarks/mask_scenes/{part}.tsv"
        threads: 1
        resources:
            mem_mb=mem_mb(2500),
            runtime=minutes(60),
        params:
            config=keys("aoi", "grid.crs", "masks", "scenes.jobs"),
            code=code_digest("preprocess.scenes"),
        message:
            "Mask clouds, shadows and snow of scenes, {wildcards.part}"
        shell:
            "terraloom mask-scenes --campaign work/campaign.yaml --part {wildcards.part} "
            "> {log} 2>&1"

    rule measure_shifts:
        input:
            lock="results/scenes/items.json",
            masks=expand("results/scenes/masks/{part}.json", part=PARTS),
        output:
            "results/scenes/shifts.json",
        log:
            "logs/measure_shifts.log",
        benchmark:
            "benchmarks/measure_shifts.tsv"
        threads: 1
        resources:
            mem_mb=mem_mb(2500),
            runtime=minutes(60),
        params:
            config=keys("aoi", "grid.crs", "coregister", "scenes"),
            code=code_digest("preprocess.shifts"),
        message:
            "Measure the sub-pixel shifts between scenes"
        shell:
            "terraloom measure-shifts --campaign work/campaign.yaml > {log} 2>&1"

    rule audit_scenes:
        input:
            lock="results/scenes/items.json",
            masks=expand("results/scenes/masks/{part}.json", part=PARTS),
            verified="results/scenes/verified.json",
            shifts="results/scenes/shifts.json",
        output:
            quality="results/scenes/quality.csv",
            metrics="results/scenes/metrics.json",
        log:
            "logs/audit_scenes.log",
        benchmark:
            "benchmarks/audit_scenes.tsv"
        threads: 1
        resources:
            mem_mb=mem_mb(1000),
            runtime=minutes(10),
        params:
            config=keys("aoi", "scenes"),
            code=code_digest("preprocess.audit"),
        message:
            "Write the quality table of the scenes"
        shell:
            "terraloom audit-scenes --campaign work/campaign.yaml > {log} 2>&1"


# The cube is an intermediate in work/, so it is rebuilt from frozen scenes too.
rule build_cube:
    input:
        lock="results/scenes/items.json",
        quality="results/scenes/quality.csv",
        shifts="results/scenes/shifts.json",
        masks=expand("results/scenes/masks/{part}.json", part=PARTS),
    output:
        "work/cube/{batch}.json",
    log:
        "logs/build_cube/{batch}.log",
    benchmark:
        "benchmarks/build_cube/{batch}.tsv"
    threads: 1
    resources:
        mem_mb=mem_mb(2000),
        runtime=minutes(120),
    params:
        config=keys("aoi", "grid", "sources", "cube"),
        code=code_digest("preprocess.cube"),
    message:
        "Build the cubes of the tiles of {wildcards.batch}"
    shell:
        "terraloom build-cube --campaign work/campaign.yaml --batch {wildcards.batch} > {log} 2>&1"
