import pytest
import torch

from gblr_plugin import ConfigError
from gblr_plugin.data.images import ArrayImages, EvalView, ImageFolder, TrainView, image_folders

Image = pytest.importorskip("PIL.Image")

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def write(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width, _ = pixels.shape
    Image.frombytes("RGB", (width, height), pixels.numpy().tobytes()).save(path, **options)


def plain(height, width, colour):
    return torch.tensor(colour, dtype=torch.uint8).expand(height, width, 3).contiguous()


@pytest.fixture
def folder(tmp_path):
    """Two classes in ImageNet's layout: red and blue, JPEG and PNG, of several sizes, one grey."""
    for part in ("train", "val"):
        for index, size in enumerate([(40, 60), (90, 50)]):
            write(tmp_path / part / "n01" / f"{index}.JPEG", plain(*size, (250, 5, 5)), quality=95)
            write(tmp_path / part / "n02" / "deeper" / f"{index}.png", plain(*size, (5, 5, 250)))
    Image.new("L", (30, 30), 128).save(tmp_path / "train" / "n02" / "grey.jpg")
    (tmp_path / "train" / "n02" / "notes.txt").write_text("no image")
    return tmp_path


def colours(x):
    return (x * STD[:, None, None] + MEAN[:, None, None]) * 255


def test_a_folder_gives_normalised_images_and_labels(folder):
    train, held_out = image_folders(str(folder), 16, imagenet=False)
    assert (len(train), len(held_out), train.classes) == (5, 4, ["n01", "n02"])
    x, target = held_out[0]
    assert (x.shape, x.dtype, target.dtype, int(target)) == ((3, 16, 16), torch.float32, torch.int64, 0)
    torch.testing.assert_close(colours(x)[:, 8, 8], torch.tensor([250.0, 5.0, 5.0]), atol=4, rtol=0)
    assert [int(target) for _, target in held_out] == [0, 0, 1, 1]
    grey = next(i for i, (file, _) in enumerate(train.files) if file.endswith("grey.jpg"))
    torch.testing.assert_close(colours(train[grey][0]), torch.full((3, 16, 16), 128.0), atol=2, rtol=0)


def test_the_evaluation_view_is_the_centre_square(tmp_path):
    """Left half black, right half white, and a frame that the centre leaves out."""
    pixels = torch.zeros(100, 140, 3, dtype=torch.uint8)
    pixels[:, 70:] = 255
    frame = torch.tensor([255, 0, 0], dtype=torch.uint8)
    pixels[:6], pixels[-6:] = frame, frame
    write(tmp_path / "a" / "x.png", pixels)
    x, _ = ImageFolder(tmp_path, ["a"], EvalView(20))[0]
    shown = colours(x)
    assert float(shown[:, :, :8].max()) < 20  # the filter rings a little
    assert float(shown[:, :, 12:].min()) > 235
    assert EvalView(224).box(256, 256) == (16, 16, 240, 240)


def test_a_large_jpeg_is_decoded_small_to_the_same_picture(tmp_path):
    y, x = torch.meshgrid(torch.arange(800), torch.arange(1000), indexing="ij")
    pixels = torch.stack([x / 4, y / 4, torch.full_like(x, 90) + 0.0], -1).to(torch.uint8)
    write(tmp_path / "a" / "x.jpg", pixels, quality=95)
    write(tmp_path / "b" / "x.png", pixels)
    folder = ImageFolder(tmp_path, ["a", "b"], EvalView(32))
    jpeg, png = colours(folder[0][0]), colours(folder[1][0])
    assert float((jpeg - png).abs().mean()) < 1.5  # the PNG is decoded whole


def test_training_views_differ_lie_inside_and_show_at_least_their_share():
    torch.manual_seed(0)
    view = TrainView(32)
    boxes = [view.box(100, 60) for _ in range(200)]
    assert len(set(boxes)) == 200
    for left, upper, right, lower in boxes:
        assert 0 <= left < right <= 100
        assert 0 <= upper < lower <= 60
        assert (right - left) * (lower - upper) >= 0.08 * 6000 * 0.999
        assert 3 / 4 * 0.999 <= (right - left) / (lower - upper) <= 4 / 3 * 1.001
    assert 60 < sum(view.mirrored() for _ in range(200)) < 140
    assert view.box(1000, 10) == pytest.approx((1000 / 2 - 20 / 3, 0, 1000 / 2 + 20 / 3, 10))  # no draw fits


def test_workers_give_what_one_process_gives(folder):
    _, held_out = image_folders(str(folder), 16, imagenet=False)
    alone, spread = (torch.utils.data.DataLoader(held_out, 2, num_workers=count) for count in (0, 2))
    for (x, target), (y, again) in zip(alone, spread, strict=True):
        assert torch.equal(x, y)
        assert torch.equal(target, again)


def test_arrays_are_shifted_and_mirrored_only_in_training():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    target = torch.tensor([0, 1, 2])
    still = ArrayImages(images, target, 32, augment=False)
    torch.testing.assert_close(colours(still[1][0]), images[1].float(), atol=1e-3, rtol=0)
    moving = ArrayImages(images, target, 32, augment=True)
    assert not torch.equal(moving[1][0], moving[1][0])
    assert ArrayImages(images, target, 64, augment=True)[2][0].shape == (3, 64, 64)


def test_what_is_missing_or_wrong_is_one_line_that_says_where(folder, tmp_path):
    def message(place, imagenet=False):
        with pytest.raises(ConfigError) as caught:
            image_folders(place, 16, imagenet=imagenet)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    nowhere = message(str(tmp_path / "nowhere"), imagenet=True)
    assert nowhere.startswith(
        f"data: no ImageNet in '{tmp_path / 'nowhere'}': looked for train/<class>/ and val/<class>/"
    )
    assert "image-net.org" in nowhere
    assert "folder must be the path of" in message(None)
    assert "ImageNet has 1000 classes" in message(str(folder), imagenet=True)
    (folder / "val" / "n03").mkdir()
    assert "class 'n03' is in only one of" in message(str(folder))
    (folder / "train" / "n03").mkdir()
    assert "no image in" in message(str(folder))
    (tmp_path / "half" / "train" / "a").mkdir(parents=True)
    assert "looked for train/<class>/" in message(str(tmp_path / "half"))


def test_a_damaged_image_is_named(folder):
    broken = folder / "val" / "n01" / "0.JPEG"
    broken.write_bytes(broken.read_bytes()[:200])
    _, held_out = image_folders(str(folder), 16, imagenet=False)
    with pytest.raises(ConfigError, match=r"0\.JPEG' is no image that can be read"):
        held_out[0]
