"""Conversions on the ellipsoid against published values."""

import numpy as np
import pytest

from alpacache.converters.geodesy import convergence_rad, ecef_of, enu_m, geodetic_of, level_axes


def test_ecef_is_that_of_published_examples():
    # pymap3d's own reference values; the axes of the ellipsoid
    np.testing.assert_allclose(ecef_of(42, -82, 200), [660675.2518247, -4700948.68316, 4245737.66222], atol=1e-5)
    np.testing.assert_allclose(ecef_of(0, 0, 0), [6378137, 0, 0], atol=1e-9)
    np.testing.assert_allclose(ecef_of(90, 0, 1), [0, 0, 6356752.314245 + 1], atol=1e-6)


def test_enu_is_that_of_published_examples():
    # the Matterhorn seen from Zermatt, as the manual of MATLAB's geodetic2enu has it
    np.testing.assert_allclose(
        enu_m(45.976, 7.658, 4531, origin=(46.017, 7.750, 1673)), [-7134.8, -4556.3, 2852.4], atol=0.05
    )
    # pymap3d's reference: azimuth 33, elevation 70 degrees, 1 km away
    np.testing.assert_allclose(
        enu_m(42.002582, -81.997752, 1139.7018, origin=(42, -82, 200)), [186.277521, 286.84222, 939.69262], atol=0.06
    )


@pytest.mark.parametrize("place", [(42, -82, 200), (-33.9, 151.2, 8848), (0, 180, -400), (89.9999, 10, 35), (90, 0, 0)])
def test_places_come_back(place):
    latitude, longitude, height = geodetic_of(ecef_of(*place))
    assert (latitude, height) == (pytest.approx(place[0], abs=1e-11), pytest.approx(place[2], abs=1e-6))
    assert abs(longitude - place[1]) < 1e-9 or place[0] == 90


def test_axes_are_right_handed_and_north_turns_on_the_way_east():
    axes = level_axes([50.0, 50.0], [8.0, 8.1])
    np.testing.assert_allclose(np.linalg.det(axes), 1)
    north = axes[0] @ axes[1][1]  # north at 8.1 degrees, seen from 8.0
    assert np.rad2deg(np.arctan2(-north[0], north[1])) == pytest.approx(0.1 * np.sin(np.deg2rad(50)), abs=1e-4)


def test_a_heading_against_north_of_its_place_is_further_left_to_the_east():
    """A metre to the north of a place 10 km east, seen from the origin; to the south of the equator it leans right."""
    for latitude, side in ((48.0, 1), (-48.0, -1)):
        east_deg = 0.1342
        ahead = enu_m([latitude, latitude + 1e-5], [11 + east_deg] * 2, [0, 0], (latitude, 11.0, 0.0))
        assert 9_990 < ahead[0, 0] < 10_020
        leans = np.arctan2(-(ahead[1, 0] - ahead[0, 0]), ahead[1, 1] - ahead[0, 1])
        assert convergence_rad([latitude] * 2, [11, 11 + east_deg])[1] == pytest.approx(leans, rel=1e-5)
        assert np.rad2deg(leans) == pytest.approx(side * east_deg * np.sin(np.deg2rad(48)), rel=1e-3)
