"""Every model of the zoo against torchvision's published parameters and multiply-adds; networks in words by hand.

The figures are facts read from torchvision 0.29's weights metadata (`num_params`, and `_ops`, which counts one
multiply-add as one operation) at the crop size of the same entry.
"""

import pytest

torch = pytest.importorskip("torch")

from perjoule.core.errors import BadInput, UnknownName  # noqa: E402
from perjoule.count.counter import count_module  # noqa: E402
from perjoule.doors import zoo  # noqa: E402
from perjoule.doors.zoo import words  # noqa: E402

PUBLISHED = {
    ("alexnet", 224): (61_100_840, 0.714), ("vgg11", 224): (132_863_336, 7.609),
    ("vgg11_bn", 224): (132_868_840, 7.609), ("vgg13", 224): (133_047_848, 11.308),
    ("vgg13_bn", 224): (133_053_736, 11.308), ("vgg16", 224): (138_357_544, 15.47),
    ("vgg16_bn", 224): (138_365_992, 15.47), ("vgg19", 224): (143_667_240, 19.632),
    ("vgg19_bn", 224): (143_678_248, 19.632), ("squeezenet1_0", 224): (1_248_424, 0.819),
    ("squeezenet1_1", 224): (1_235_496, 0.349), ("googlenet", 224): (6_624_904, 1.498),
    ("inception_v3", 299): (27_161_264, 5.713), ("resnet18", 224): (11_689_512, 1.814),
    ("resnet34", 224): (21_797_672, 3.664), ("resnet50", 224): (25_557_032, 4.089),
    ("resnet101", 224): (44_549_160, 7.801), ("resnet152", 224): (60_192_808, 11.514),
    ("resnext50_32x4d", 224): (25_028_904, 4.23), ("resnext101_32x8d", 224): (88_791_336, 16.414),
    ("resnext101_64x4d", 224): (83_455_272, 15.46), ("wide_resnet50_2", 224): (68_883_240, 11.398),
    ("wide_resnet101_2", 224): (126_886_696, 22.753), ("densenet121", 224): (7_978_856, 2.834),
    ("densenet161", 224): (28_681_000, 7.728), ("densenet169", 224): (14_149_480, 3.36),
    ("densenet201", 224): (20_013_928, 4.291), ("mobilenet_v2", 224): (3_504_872, 0.301),
    ("mobilenet_v3_small", 224): (2_542_856, 0.057), ("mobilenet_v3_large", 224): (5_483_032, 0.217),
    ("mnasnet0_5", 224): (2_218_512, 0.104), ("mnasnet0_75", 224): (3_170_208, 0.215),
    ("mnasnet1_0", 224): (4_383_312, 0.314), ("mnasnet1_3", 224): (6_282_256, 0.526),
    ("shufflenet_v2_x0_5", 224): (1_366_792, 0.04), ("shufflenet_v2_x1_0", 224): (2_278_604, 0.145),
    ("shufflenet_v2_x1_5", 224): (3_503_624, 0.296), ("shufflenet_v2_x2_0", 224): (7_393_996, 0.583),
    ("efficientnet_b0", 224): (5_288_548, 0.386), ("efficientnet_b1", 240): (7_794_184, 0.687),
    ("efficientnet_b2", 288): (9_109_994, 1.088), ("efficientnet_b3", 300): (12_233_232, 1.827),
    ("efficientnet_b4", 380): (19_341_616, 4.394), ("efficientnet_b5", 456): (30_389_784, 10.266),
    ("efficientnet_b6", 528): (43_040_704, 19.068), ("efficientnet_b7", 600): (66_347_960, 37.746),
    ("efficientnet_v2_s", 384): (21_458_488, 8.366), ("efficientnet_v2_m", 480): (54_139_356, 24.582),
    ("efficientnet_v2_l", 480): (118_515_272, 56.08), ("regnet_x_400mf", 224): (5_495_976, 0.414),
    ("regnet_x_800mf", 224): (7_259_656, 0.8), ("regnet_x_1_6gf", 224): (9_190_136, 1.603),
    ("regnet_x_3_2gf", 224): (15_296_552, 3.177), ("regnet_x_8gf", 224): (39_572_648, 7.995),
    ("regnet_x_16gf", 224): (54_278_536, 15.941), ("regnet_x_32gf", 224): (107_811_560, 31.736),
    ("regnet_y_400mf", 224): (4_344_144, 0.402), ("regnet_y_800mf", 224): (6_432_512, 0.834),
    ("regnet_y_1_6gf", 224): (11_202_430, 1.612), ("regnet_y_3_2gf", 224): (19_436_338, 3.176),
    ("regnet_y_8gf", 224): (39_381_472, 8.473), ("regnet_y_16gf", 224): (83_590_140, 15.912),
    ("regnet_y_16gf", 384): (83_590_140, 46.735), ("regnet_y_32gf", 224): (145_046_770, 32.28),
    ("regnet_y_32gf", 384): (145_046_770, 94.826), ("regnet_y_128gf", 384): (644_812_894, 374.57),
    ("regnet_y_128gf", 224): (644_812_894, 127.518), ("convnext_tiny", 224): (28_589_128, 4.456),
    ("convnext_small", 224): (50_223_688, 8.684), ("convnext_base", 224): (88_591_464, 15.355),
    ("convnext_large", 224): (197_767_336, 34.361), ("vit_b_16", 224): (86_567_656, 17.564),
    ("vit_b_16", 384): (86_859_496, 55.484), ("vit_b_32", 224): (88_224_232, 4.409),
    ("vit_l_16", 224): (304_326_632, 61.555), ("vit_l_16", 512): (305_174_504, 361.986),
    ("vit_l_32", 224): (306_535_400, 15.378), ("vit_h_14", 518): (633_470_440, 1016.717),
    ("vit_h_14", 224): (632_045_800, 167.295), ("swin_t", 224): (28_288_354, 4.491),
    ("swin_s", 224): (49_606_258, 8.741), ("swin_b", 224): (87_768_224, 15.431),
    ("swin_v2_t", 256): (28_351_570, 5.94), ("swin_v2_s", 256): (49_737_442, 11.546),
    ("swin_v2_b", 256): (87_930_848, 20.325), ("maxvit_t", 224): (30_919_624, 5.558),
}  # fmt: skip
"""(name, side of the picture): (parameters, GMACs to three decimals)."""
BRIEF = {"resnet18", "vgg16_bn", "densenet121", "mobilenet_v3_large", "efficientnet_v2_s", "swin_v2_t", "maxvit_t"}


@pytest.mark.parametrize(("name", "side"), PUBLISHED, ids=lambda v: str(v))
def test_parameters_and_multiply_adds_are_the_published_ones(name, side):
    params, gmacs = PUBLISHED[name, side]
    model, batch = zoo.build(name, (1, 3, side, side))
    ledger = count_module(model, batch)
    assert ledger.param_count == params
    assert abs(ledger.matmul_flops / 2e9 - gmacs) <= 0.0005001, "differs in the printed digits"
    assert ledger.coverage == 1.0


def test_every_name_has_a_published_figure():
    assert {name for name, _ in PUBLISHED} == set(zoo.names())


@pytest.mark.parametrize("name", sorted(BRIEF))
def test_models_stand_on_the_meta_device_and_answer(name):
    model, batch = zoo.build(name)
    assert all(p.is_meta for p in model.parameters())
    assert not model.training
    assert model(batch["x"]).shape == (1, 1000)


def test_batch_and_size_are_the_callers():
    one, two = (count_module(*zoo.build("resnet18", (n, 3, 224, 224))).matmul_flops for n in (1, 2))
    assert two == 2 * one
    wide = count_module(*zoo.build("resnet18", (1, 3, 448, 224)))
    assert wide.matmul_flops - 2 * 512 * 1000 == 2 * (one - 2 * 512 * 1000)


def test_an_auxiliary_head_runs_in_training_only():
    model, batch = zoo.build("inception_v3", (2, 3, 299, 299))
    alone = count_module(model.aux, {"x": torch.empty(2, 768, 17, 17, device="meta")}).matmul_flops
    evaluated = count_module(model, batch).matmul_flops
    trained = count_module(model.train(), batch, phase="train").during("forward").matmul_flops
    assert trained == evaluated + alone


def test_what_cannot_be_built_is_said():
    with pytest.raises(UnknownName, match="did you mean resnet50"):
        zoo.build("resnet500")
    with pytest.raises(BadInput, match="batch x 3 x height x width, not 1x1x28x28"):
        zoo.build("resnet18", (1, 1, 28, 28))
    with pytest.raises(BadInput, match="patch of 16"):
        zoo.build("vit_b_16", (1, 3, 230, 230))
    with pytest.raises(BadInput, match="divide by 224"):
        zoo.build("maxvit_t", (1, 3, 256, 256))


# networks in words


@pytest.mark.parametrize(
    ("text", "shape", "macs", "params"),
    [
        ("Linear(784,100) ReLU Linear(100,10)", (), 78_400 + 1000, 79_510),
        ("Linear(784, 100) -> relu -> Linear(100, 10, nobias)", (), 79_400, 79_500),
        ("Conv(3,8,3,s2,p1) Flatten Linear(2048,10)", (1, 3, 32, 32), 256 * 27 * 8 + 20_480, 224 + 20_490),
        ("Conv2d(8,8,kernel_size=3,padding=1,groups=8,bias=False)", (1, 8, 16, 16), 256 * 9 * 8, 72),
        ("Conv(4,4,(3,1),padding=(1,0))", (1, 4, 6, 6), 36 * 3 * 16, 52),
        ("DWConv(8,3,p1) BN", (1, 8, 16, 16), 256 * 9 * 8, 80 + 16),
        ("Conv1d(4,6,5,same)", (2, 4, 20), 2 * 20 * 5 * 24, 126),
        ("ConvTranspose(8,4,2,s2)", (1, 8, 16, 16), 256 * 4 * 32, 132),
        ("Conv(2,3,3) AvgPool(2) GAP Linear(3,5)", (1, 2, 10, 10), 64 * 9 * 6 + 15, 57 + 20),
        ("Embedding(50,16) GRU(16,8) Linear(8,2) on last step", (3, 7), 3 * 7 * 3 * 8 * 24 + 3 * 16, 800 + 624 + 18),
        ("LSTM(28,64,2 layers,bidirectional) Linear(128,10)", (1, 5, 28),
         5 * 2 * 256 * (28 + 64 + 128 + 64) + 5 * 1280, 2 * 256 * (28 + 64 + 128 + 64 + 4) + 1290),
        ("Linear(16,16) x3 Tanh LayerNorm", (2, 16), 2 * 3 * 256, 3 * 272 + 32),
        ("MHA(16,4)", (1, 6, 16), 6 * 4 * 256 + 2 * 36 * 16, 4 * 256 + 64),
    ],
)  # fmt: skip
def test_words_become_the_network_they_name(text, shape, macs, params):
    ledger = count_module(*words.build(text, shape))
    assert ledger.matmul_flops == 2 * macs
    assert ledger.param_count == params


@pytest.mark.parametrize(
    ("text", "shape", "message"),
    [
        ("Conv(1,2,3)", (), "give the shape of its input"),
        ("Linear(4,4) Foo(3)", (), "unknown layer 'Foo'"),
        ("Linear(4,4) on the moon", (), "unknown layer 'on'"),
        ("Conv(1,2,3) Linear(5,5)", (1, 1, 8, 8), "Linear does not take an input of 1x72"),
        ("Linear(4)", (), "out is missing"),
        ("Linear(4,4) !", (), "is no layer"),
        ("", (), "names no layer"),
    ],
)
def test_words_that_mean_nothing_are_errors(text, shape, message):
    with pytest.raises(BadInput, match=message):
        words.build(text, shape)
