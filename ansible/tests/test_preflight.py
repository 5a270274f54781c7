"""What is refused before anything is done to a machine."""


def test_all_reasons_are_given_at_once(bed, play):
    impossible = {
        "preflight_supported": {"Debian": ["99"]},
        "preflight_min_kernel": "99.0",
        "preflight_min_free_gib": 10**6,
        "preflight_max_clock_offset_s": -1,
        "preflight_gpu_required": True,
        "preflight_pci_path": "/srv/nothing",
    }
    groups = {"slurm_controllers": ["c1"], "slurm_nodes": ["c1"]}
    refused = play("slurm", groups, impossible, "--tags", "preflight", check=False)
    assert refused.code != 0
    assert refused.changed == {"c1": 0}
    text = " ".join(refused.output.split())
    for reason in (
        "operating system Debian 12",
        "accepted are Debian 99",
        "99.0 or later is needed (preflight_min_kernel)",
        "1000000 GiB are needed (preflight_min_free_gib)",
        "accepted are -1 s (preflight_max_clock_offset_s)",
        "GPU: no NVIDIA display controller under /srv/nothing",
    ):
        assert reason in text, reason


def test_mistyped_variable_of_a_role_is_refused(bed, play):
    groups = {"slurm_controllers": ["c1"], "slurm_nodes": ["c1"]}
    refused = play("slurm", groups, {"preflight_min_free_gib": "much"}, "--tags", "preflight", check=False)
    assert refused.code != 0
    assert "preflight_min_free_gib" in refused.output
