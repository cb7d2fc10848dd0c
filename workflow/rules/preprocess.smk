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
            config=keys(
                "aoi",
                "scenes.on_bad_item",
                "scenes.max_failed_pct",
                "scenes.max_asset_gb",
            ),
            code=code_digest("preprocess.verify"),
        message:
            "Check every asset against its record"
        shell:
            "terraloom verify-items --campaign work/campaign.yaml > {log} 2>&1"

    rule mask_scenes:
        input:
            lambda wildcards: unless_kept(
                ["results/scenes/items.json", "results/scenes/verified.json"],
                f"results/scenes/masks/{wildcards.period}-{wildcards.part}.json",
                mask_stamp(wildcards),
            ),
        output:
            "results/scenes/masks/{period}-{part}.json",
        log:
            "logs/mask_scenes/{period}-{part}.log",
        benchmark:
            "benchmarks/mask_scenes/{period}-{part}.tsv"
        threads: 1
        resources:
            mem_mb=mem_mb(2500),
            runtime=minutes(60),
        params:
            stamp=mask_stamp,
            code=code_digest("preprocess.masking"),
        message:
            "Mask clouds, shadows and snow of {wildcards.period}, {wildcards.part}"
        shell:
            "terraloom mask-scenes --campaign work/campaign.yaml --period {wildcards.period} "
            "--part {wildcards.part} --stamp {params.stamp} > {log} 2>&1"

    rule measure_shifts:
        input:
            PLAN.reference_files,
            lock="results/scenes/items.json",
            masks=MASKS,
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
            config=keys(*LOCK_KEYS, "grid", "coregister", "scenes"),
            code=code_digest("preprocess.shifts"),
        message:
            "Measure the sub-pixel shifts between scenes"
        shell:
            "terraloom measure-shifts --campaign work/campaign.yaml > {log} 2>&1"

    # It also writes audit.json, which is no output: it must outlive a failed audit.
    rule audit_scenes:
        input:
            lock="results/scenes/items.json",
            masks=MASKS,
            verified="results/scenes/verified.json",
            shifts="results/scenes/shifts.json",
        output:
            "results/scenes/quality.csv",
            "results/scenes/masks.csv",
            "results/scenes/metrics.json",
        log:
            "logs/audit_scenes.log",
        benchmark:
            "benchmarks/audit_scenes.tsv"
        threads: 1
        resources:
            mem_mb=mem_mb(2000),
            runtime=minutes(60),
        params:
            config=keys(*LOCK_KEYS, "grid", "scenes", "coregister.enabled"),
            code=code_digest("preprocess.audit"),
        message:
            "Check the scenes and write their quality table"
        shell:
            "terraloom audit-scenes --campaign work/campaign.yaml > {log} 2>&1"


# The cube is an intermediate in work/, so it is rebuilt from frozen scenes too.
rule build_cube:
    input:
        lambda wildcards: unless_kept(
            [
                "results/scenes/items.json",
                "results/scenes/quality.csv",
                "results/scenes/shifts.json",
                *MASKS,
            ],
            f"work/cube/{wildcards.batch}.json",
            cube_stamp(wildcards),
        ),
    output:
        "work/cube/{batch}.json",
    log:
        "logs/build_cube/{batch}.log",
    benchmark:
        "benchmarks/build_cube/{batch}.tsv"
    threads: 2
    resources:
        mem_mb=mem_mb(2000),
        runtime=minutes(60, per_tile=2),
    params:
        stamp=cube_stamp,
        code=code_digest("preprocess.build"),
    message:
        "Build the cubes of the tiles of {wildcards.batch}"
    shell:
        "terraloom build-cube --campaign work/campaign.yaml --batch {wildcards.batch} "
        "--stamp {params.stamp} > {log} 2>&1"
