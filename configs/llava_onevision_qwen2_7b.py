"""LLaVA-OneVision 7B: SigLIP so400m at 384 pixels, Qwen2 7B Instruct; then single images, several images and videos.

Stage align has 558K pairs, mid about 4M re-captioned images and documents, single_image 3.2M rows, onevision 1.6M.
The last three train all parts, on mixture files (data/README.md) with the data sets of LLaVA-NeXT's mid_stage.yaml,
single_image.yaml and onevision.yaml, of which some were never released. Rates are those of its finetune_si.sh and
finetune_ov.sh. By typical lengths, 64 sequences of 16,384 tokens have 325 conversations in mid and single_image and 187
in onevision; the published batch is 256. In align 32 sequences have 512; its scripts have 16 a device, on an unknown
number. The images of stage mid are not in the scripts: a cap of 4 tiles gives up to 5 x 729 tokens. A sequence has room
for the tiles of the largest image: 1 + 36.
"""

from llava_jax.config import Data, Mesh, Model, Recipe, Stage


def recipe(language: str = "checkpoints/Qwen2-7B-Instruct", output: str = "runs/llava_onevision_qwen2_7b") -> Recipe:
    def tune(name: str, image_mode: str | None = None) -> Stage:
        return Stage(
            learning_rates=(("(projector|decoder)/.*|image_newline", 1e-5), ("vision/.*", 2e-6)),
            data=Data(path=f"data/onevision/{name}.json", image_mode=image_mode, sequence_length=16_384,
                      tiles_per_sequence=37, bad_rows="skip", workers=16),
            batch_size=64)

    return Recipe(
        model=Model(vision="checkpoints/siglip-so400m-patch14-384", language=language, projector="mlp2x_gelu",
                    image_mode="anyres_max_9", pinpoints="(1x1),...,(6x6)", template="qwen_1_5"),
        mesh=Mesh(fsdp=-1),
        stages={
            # The newline is trained with the decoder, as in the original.
            "align": Stage(
                learning_rates=(("projector/.*", 1e-3), ("(vision|decoder)/.*|image_newline", None)),
                data=Data(path="data/blip_laion_cc_sbu_558k.json", image_root="data/blip_laion_cc_sbu_558k",
                          template="plain", image_mode="resize", sequence_length=12_288, tiles_per_sequence=16,
                          workers=16),
                batch_size=32),
            "mid": tune("mid_stage", "anyres_max_4"),
            "single_image": tune("single_image"),
            "onevision": tune("onevision"),
        },
        output=output,
    )
