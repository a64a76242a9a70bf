
BlogitsJPг~АAt╘┌B▀ж@6fйA■F≈б÷ЗAа·YA©@биGЫ╫∙Нbю╥{AB·5░B┐э5A ы╚A█╔б╒Ф┤а╢Ag=eб
2Kа fж@