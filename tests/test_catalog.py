import pytest

from thriftlm.catalog import gpu, gpus
from thriftlm.spec import InputError


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("A100-80GB", "A100-80GB"),  # an id wins over the same SkyPilot name of the PCIe card
        ("a100 80gb", "A100-80GB"),
        ("A100-80G", "A100-80GB"),  # Ray's optional label
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),  # nvidia-smi
        ("NVIDIA A100 80GB PCIe", "A100-80GB-PCIe"),
        ("NVIDIA H100 80GB HBM3", "H100-80GB"),
        ("H100", "H100-80GB"),  # without a form factor it means SXM
        ("H100-NVL", "H100-94GB-NVL"),
        ("Tesla V100-SXM2-16GB", "V100-16GB"),
        ("H100-MEGA", "H100-80GB"),
        ("l40s", "L40S-48GB"),
        ("NVIDIA GeForce RTX 3090", "RTX3090"),
        ("RTX-4090", "RTX4090"),
        ("4090", "RTX4090"),
        ("NVIDIA GeForce RTX 5090", "RTX5090"),
        ("rtx 5060 ti", "RTX5060Ti-16GB"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTXPRO6000-96GB"),
        ("NVIDIA RTX A6000", "A6000"),
        ("nvidia a40", "A40"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("H100 64GB", "H100-64GB"),
        ("A100-SXM-64GB", "A100-64GB"),
        ("CPU", "cpu"),
    ],
)
def test_names_of_ray_skypilot_and_people(name, key):
    assert gpu(name).id == key


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("A100", "'A100' names several GPUs: A100-40GB, A100-80GB; say which"),
        ("V100", "'V100' names several GPUs: V100-16GB, V100-32GB; say which"),
        ("A100-8GB", "did you mean 'A100-80GB'?"),
        ("H1000", "did you mean 'H100-80GB'?"),
        ("abacus", "unknown GPU 'abacus'; known: A100-40GB,"),
        ("RTX 6000", "unknown GPU 'RTX 6000'"),  # neither the PRO 6000 nor the A6000
        ("RTX 3090 Ti", "unknown GPU 'RTX 3090 Ti'"),
        ("", "unknown GPU ''"),
    ],
)
def test_a_name_that_is_not_one_gpu_is_refused(name, message):
    with pytest.raises(InputError) as error:
        gpu(name)
    assert message in str(error.value)


def test_every_entry_has_a_source_and_cpu_has_no_peak():
    assert all(entry.source for entry in gpus().values())
    assert gpu("cpu").bf16_tflops is None
    assert gpu("T4").bf16_tflops is None  # no bf16 tensor cores
    assert gpu("H200").bf16_tflops == 989  # dense, not the 1979 of the sparse sheet


def test_every_own_name_finds_its_entry():
    for key, entry in gpus().items():
        assert gpu(key) is gpu(key.lower()) is gpu(entry.product if key != "cpu" else key) is entry


def test_every_canonical_id_of_the_design_is_there_with_what_an_estimate_needs():
    ids = [
        "A100-40GB",
        "A100-80GB",
        "A100-64GB",
        "H100-80GB",
        "H100-64GB",
        "H100-96GB",
        "H200-141GB",
        "B200-180GB",
        "L4-24GB",
        "A10G-24GB",
        "L40S-48GB",
        "V100-16GB",
        "V100-32GB",
        "T4-16GB",
        "RTX3090",
        "RTX4090",
        "RTX5090",
        "RTX5060Ti-16GB",
        "RTXPRO6000-96GB",
        "A6000",
        "A40",
        "GH200",
    ]
    for entry in map(gpu, ids):
        assert entry.memory_gib is not None
        assert entry.memory_gb_per_s is not None
        assert entry.compute_capability is not None
        assert entry.compute_capability < 8 or entry.bf16_tflops is not None
    # fp32 accumulation, which training uses: half of what the boxes of consumer cards say.
    assert gpu("RTX4090").bf16_tflops == 165.2
    assert gpu("RTXPRO6000").compute_capability == 12.0


def test_an_fp32_peak_is_dense_and_never_a_tensor_core_rate():
    # Vector units: 2 FLOPs x cores x clock. TF32 on an A100 would be 156, on an H100 494.
    assert gpu("A100-40GB").fp32_tflops == 19.5
    assert gpu("H100").fp32_tflops == 67
    assert gpu("cpu").fp32_tflops is None
    for entry in gpus().values():
        if entry.fp32_tflops and entry.bf16_tflops:
            assert entry.fp32_tflops <= entry.bf16_tflops / 1.99


def test_usable_memory_is_what_the_driver_reports_else_the_nominal_size():
    assert gpu("A10G").usable_memory_gib == 22888 / 1024  # EC2; sold as 24 GB
    assert gpu("RTX4090").usable_memory_gib == 24564 / 1024  # nvidia-smi
    assert gpu("A100-64GB").usable_memory_gib == 64  # not known
    assert gpu("cpu").usable_memory_gib is None
    for entry in gpus().values():
        if entry.id != "cpu":
            assert 0.9 < entry.usable_memory_gib / entry.memory_gib <= 1
